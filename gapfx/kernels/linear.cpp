// Linear layers with a sparse weight: products and gradients of live values alone, in panels of 64 tokens.
//
// A few panels at a time (as many as threads, twice as many backward, more where they are small) are packed, multiplied
// and unpacked, so that no second copy of large activations exists. Threads share panels, and rows where there are fewer
// panels than threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "linear.h"
#define GAPFX_BODY "linear_body.h"
#include "each_level.h"

namespace {

using namespace gapfx::linear;

constexpr int64_t kSlice = 256;          // outputs of a slice: what a thread multiplies before it unpacks
constexpr int64_t kPackedColumns = 256;  // features that a thread packs at a time
// Packed panels that threads wait for each other about: a wait may take as long as the product of a small layer.
constexpr int64_t kTogether = int64_t{1} << 20;

const Kernels& kernels() {
#if GAPFX_X86
  if (gapfx::level() == gapfx::kAvx512) return avx512::kKernels;
  if (gapfx::level() == gapfx::kAvx2) return avx2::kKernels;
#endif
  return portable::kKernels;
}

struct Freed {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

template <typename T>
using Scratch = std::unique_ptr<T[], Freed>;

template <typename T>
Scratch<T> scratch(int64_t size) {
  return Scratch<T>(static_cast<T*>(::operator new(std::max<int64_t>(size, 1) * sizeof(T), std::align_val_t{64})));
}

int64_t ceil_div(int64_t number, int64_t by) { return (number + by - 1) / by; }

// Panels that are packed before any is multiplied: at least `least`, an even number of each thread unless they are all.
int64_t num_together(int64_t panels, int64_t least, int64_t features, int threads) {
  if (threads == 1) return std::min(panels, least);
  const int64_t of_each = kTogether / (4 * kPanel * std::max<int64_t>(features, 1)) / (2 * threads);
  return std::min(panels, std::max(least, of_each * 2 * threads));
}

// Rows of activations [tokens][features], fp32 or bf16.
struct Rows {
  char* data;
  int64_t tokens, features;
  int is_fp32;

  int64_t num_panels() const { return ceil_div(tokens, kPanel); }
  int tokens_of(int64_t panel) const { return static_cast<int>(std::min<int64_t>(kPanel, tokens - panel * kPanel)); }
  int width_of(int64_t panel) const { return static_cast<int>(ceil_div(tokens_of(panel), kPanelStep)) * kPanelStep; }
  char* at(int64_t panel, int64_t feature) const {
    return data + (panel * kPanel * features + feature) * (is_fp32 ? 4 : 2);
  }
  void pack(int64_t panel, int64_t part, float* packed) const {
    const int64_t from = part * kPackedColumns, num = std::min(kPackedColumns, features - from);
    const Panel to = {packed + from * width_of(panel), width_of(panel)};
    kernels().pack[is_fp32](at(panel, from), features, tokens_of(panel), num, to);
  }
};

using Product = decltype(Kernels::product);

// One slice of outputs of one panel: multiplied into `part`, unpacked into `y`.
void multiply(Product product, const Pattern& p, const float* values, const float* bias, const float* packed,
              int64_t panel, int64_t slice, const Rows& y, float* part) {
  const int64_t rows = kSlice / p.block, begin = slice * rows, end = std::min(p.rows, begin + rows);
  const int width = y.width_of(panel);
  product(p, values, bias, Panel{const_cast<float*>(packed), width}, begin, end, part);
  kernels().unpack[y.is_fp32](Panel{part, width}, (end - begin) * p.block, y.at(panel, begin * p.block), y.features,
                              y.tokens_of(panel));
}

// The transposed pattern with its values, made anew for every backward: tile by tile, so that what is written at a time
// stays in the cache. Entries of a column are in the order of rows.
struct Turned {
  Pattern pattern;
  Scratch<uint16_t> rows;
  Scratch<float> values;

  Turned(const Pattern& p, const int32_t* starts, int64_t tile)
      : pattern{p.inputs, p.rows, 1, ceil_div(p.rows, tile), tile, p.inputs + 1, 1, nullptr, starts},
        rows(scratch<uint16_t>(num_entries() + kSpare)),
        values(scratch<float>(num_entries() * p.block)) {
    pattern.columns = rows.get();
  }

  int64_t num_entries() const { return pattern.starts[pattern.tiles * pattern.tile_step - 1]; }

  template <int Block>
  void fill(const Pattern& p, const float* from, int64_t tile, int32_t* cursor) {
    const int32_t *firsts = p.starts, *lasts = p.starts + p.tiles * p.rows;
    const int32_t* starts = pattern.starts + tile * pattern.tile_step;
    std::copy(starts, starts + p.inputs, cursor);
    for (int64_t row = tile * pattern.tile; row < std::min(p.rows, (tile + 1) * pattern.tile); ++row) {
      const int64_t length = lasts[row] - firsts[row];
      const float* value = from + (Block - 1) * int64_t{firsts[row]};
      for (int64_t at = firsts[row]; at < lasts[row]; ++at) {
        const int64_t place = cursor[p.columns[at]]++;
        rows[place] = static_cast<uint16_t>(row);
        for (int i = 0; i < Block; ++i) values[place * Block + i] = value[i * length + at];
      }
    }
  }
};

// Reads the mask of a weight whose rows need not start at a byte.
struct Mask {
  const uint8_t* bits;
  int64_t numel;

  // 64 bits from bit `at` on; zeros beyond the end.
  uint64_t word(int64_t at) const {
    const int64_t bytes = (numel + 7) / 8, first = at / 8, shift = at % 8;
    uint64_t low = 0;
    std::memcpy(&low, bits + first, std::min<int64_t>(8, bytes - first));
    if (shift && bytes - first > 8) return (low >> shift) | (uint64_t{bits[first + 8]} << (64 - shift));
    return low >> shift;
  }

  uint64_t word_of_row(int64_t row, int64_t columns, int64_t column) const {
    const int64_t left = columns - column;
    return word(row * columns + column) & (left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1);
  }
};

}  // namespace

// 1 where every four consecutive rows have the same bits, else 0.
GAPFX_API int gapfx_linear_has_blocks(const uint8_t* bits, int64_t outputs, int64_t inputs) {
  const Mask mask{bits, outputs * inputs};
  if (outputs % kBlock) return 0;
  for (int64_t row = 0; row < outputs; ++row)
    for (int64_t column = 0; row % kBlock && column < inputs; column += 64)
      if (mask.word_of_row(row, inputs, column) != mask.word_of_row(row - 1, inputs, column)) return 0;
  return 1;
}

// The pattern of `bits` into columns [live / block + 16] and starts [tiles + 1][outputs / block], and the starts of the
// transposed one, turned_starts [tiles of rows][inputs + 1].
GAPFX_API void gapfx_linear_prepare(const uint8_t* bits, int64_t outputs, int64_t inputs, int64_t block, int64_t tile,
                                    int64_t turned_tile, uint16_t* columns, int32_t* starts, int32_t* turned_starts) {
  const Mask mask{bits, outputs * inputs};
  const int64_t rows = outputs / block, tiles = ceil_div(inputs, tile), turned_tiles = ceil_div(rows, turned_tile);
  std::fill(turned_starts, turned_starts + turned_tiles * (inputs + 1), 0);
  int32_t num = 0;
  for (int64_t row = 0; row < rows; ++row) {
    int32_t* counts = turned_starts + row / turned_tile * (inputs + 1) + 1;
    const int32_t first = num;
    int64_t noted = 0;
    for (int64_t from = 0; from < inputs; from += 64)
      for (uint64_t word = mask.word_of_row(row * block, inputs, from); word; word &= word - 1) {
        const int64_t column = from + __builtin_ctzll(word);
        for (; noted <= column / tile; ++noted) starts[noted * rows + row] = first + (num - first) / kAlign * kAlign;
        columns[num++] = static_cast<uint16_t>(column);
        ++counts[column];
      }
    for (; noted < tiles; ++noted) starts[noted * rows + row] = first + (num - first) / kAlign * kAlign;
    starts[tiles * rows + row] = num;
  }
  std::fill(columns + num, columns + num + kSpare, 0);
  int32_t total = 0;
  for (int64_t i = 0; i < turned_tiles * (inputs + 1); ++i) turned_starts[i] = total += turned_starts[i];
}

// y [tokens][outputs] = x [tokens][inputs] @ weight.T + bias (fp32 or null). x and y are fp32, or bf16.
GAPFX_API void gapfx_linear_forward(const Pattern* pattern, const float* values, const float* bias, const void* x,
                                    void* y, int64_t tokens, int is_fp32, int threads) {
  const Pattern& p = *pattern;
  const Rows in{static_cast<char*>(const_cast<void*>(x)), tokens, p.inputs, is_fp32};
  const Rows out{static_cast<char*>(y), tokens, p.rows * p.block, is_fp32};
  const int64_t panels = in.num_panels(), together = num_together(panels, threads, p.inputs, threads);
  const int64_t parts = ceil_div(p.inputs, kPackedColumns), slices = ceil_div(out.features, kSlice);
  const Product product = p.block == 1 ? kernels().product : kernels().block_product;
  const auto packed = scratch<float>(together * p.inputs * kPanel);
#pragma omp parallel num_threads(threads)
  {
    const auto part = scratch<float>(kSlice * kPanel);
    for (int64_t from = 0; from < panels; from += together) {
      const int64_t num = std::min(together, panels - from);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < num * parts; ++i)
        in.pack(from + i / parts, i % parts, packed.get() + i / parts * p.inputs * kPanel);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < num * slices; ++i)
        multiply(product, p, values, bias, packed.get() + i / slices * p.inputs * kPanel, from + i / slices, i % slices,
                 out, part.get());
    }
  }
}

// From gradient [tokens][outputs]: grad_x [tokens][inputs] and grad_values (fp32, zeroed by the caller), each unless
// null. `turned_starts` and `turned_tile` as they were prepared. The result does not depend on the number of threads.
GAPFX_API void gapfx_linear_backward(const Pattern* pattern, const int32_t* turned_starts, int64_t turned_tile,
                                     const float* values, const void* gradient, const void* x, void* grad_x,
                                     float* grad_values, int64_t tokens, int is_fp32, int threads) {
  const Pattern& p = *pattern;
  const int64_t outputs = p.rows * p.block;
  const Rows up{static_cast<char*>(const_cast<void*>(gradient)), tokens, outputs, is_fp32};
  const Rows in{static_cast<char*>(const_cast<void*>(x)), tokens, p.inputs, is_fp32};
  const Rows down{static_cast<char*>(grad_x), tokens, p.inputs, is_fp32};
  // An even number, as the sum over tokens takes panels in pairs: the same ones for every number of threads.
  const int64_t panels = up.num_panels(), together = num_together(panels, 2 * threads, outputs + p.inputs, threads);
  const int64_t up_parts = ceil_div(outputs, kPackedColumns), in_parts = ceil_div(p.inputs, kPackedColumns);
  const int64_t slices = ceil_div(p.inputs, kSlice);
  // Where there are few rows, each thread has some.
  const int64_t rows = std::clamp<int64_t>(ceil_div(p.rows, threads), 1, kSlice / p.block), row_slices = ceil_div(p.rows, rows);
  const auto ups = scratch<float>(together * outputs * kPanel);
  const auto ins = scratch<float>(grad_values ? together * p.inputs * kPanel : 0);
  const auto turned = grad_x ? std::make_unique<Turned>(p, turned_starts, turned_tile) : nullptr;
  const Product product = p.block == 1 ? kernels().product : kernels().turned_block_product;
  const auto add_gradient = p.block == 1 ? kernels().gradient : kernels().block_gradient;
#pragma omp parallel num_threads(threads)
  {
    const auto part = scratch<float>(kSlice * kPanel);
    if (grad_x) {
      const auto cursor = scratch<int32_t>(p.inputs);
#pragma omp for schedule(static)
      for (int64_t tile = 0; tile < turned->pattern.tiles; ++tile)
        if (p.block == kBlock)
          turned->fill<kBlock>(p, values, tile, cursor.get());
        else
          turned->fill<1>(p, values, tile, cursor.get());
    }
    for (int64_t from = 0; from < panels; from += together) {
      const int64_t num = std::min(together, panels - from);
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < num * up_parts; ++i)
        up.pack(from + i / up_parts, i % up_parts, ups.get() + i / up_parts * outputs * kPanel);
      if (grad_values) {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < num * in_parts; ++i)
          in.pack(from + i / in_parts, i % in_parts, ins.get() + i / in_parts * p.inputs * kPanel);
      }
#pragma omp barrier
      if (grad_x) {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < num * slices; ++i)
          multiply(product, turned->pattern, turned->values.get(), nullptr,
                   ups.get() + i / slices * outputs * kPanel, from + i / slices, i % slices, down, part.get());
      }
      if (grad_values) {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < row_slices; ++i)
          for (int64_t pair = 0; pair < num; pair += 2) {
            const int64_t some = std::min<int64_t>(2, num - pair);
            const int rest = up.width_of(from + pair + some - 1) % kPanel;
            const Strips strips{ins.get() + pair * p.inputs * kPanel, ups.get() + pair * outputs * kPanel,
                                p.inputs * kPanel, outputs * kPanel, static_cast<int>(some) - (rest ? 1 : 0), rest};
            add_gradient(p, strips, i * rows, std::min(p.rows, (i + 1) * rows), grad_values);
          }
      }
#pragma omp barrier
    }
  }
}
