// Calls every exported kernel on odd sizes, for test_sanitizers.py. A family of kernels is one function below and one
// row of `families`. Buffers are exactly as long as what they hold, so that a step beyond them is seen.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../gapfx/kernels/convolution.h"
#include "../../gapfx/kernels/decode.h"
#include "../../gapfx/kernels/linear.h"

extern "C" {
int gapfx_use_level(int level);
int64_t gapfx_count(const uint8_t* bits, int64_t numel);
void gapfx_pack(const uint8_t* mask, uint8_t* bits, int64_t numel, int threads);
void gapfx_unpack(const uint8_t* bits, uint8_t* mask, int64_t numel, int threads);
int gapfx_expand(const void* values, const uint8_t* bits, void* dense, int64_t numel, int size, int threads);
int gapfx_gather(const void* dense, const uint8_t* bits, void* values, int64_t numel, int size, int threads);
int gapfx_linear_has_blocks(const uint8_t* bits, int64_t outputs, int64_t inputs);
void gapfx_linear_prepare(const uint8_t* bits, int64_t outputs, int64_t inputs, int64_t block, int64_t tile,
                          int64_t turned_tile, uint16_t* columns, int32_t* starts, int32_t* turned_starts);
void gapfx_linear_forward(const gapfx::linear::Pattern* pattern, const float* values, const float* bias, const void* x,
                          void* y, int64_t tokens, int is_fp32, int threads);
void gapfx_linear_backward(const gapfx::linear::Pattern* pattern, const int32_t* turned_starts, int64_t turned_tile,
                           const float* values, const void* gradient, const void* x, void* grad_x, float* grad_values,
                           int64_t tokens, int is_fp32, int threads);
int gapfx_convolution_prepare(const uint8_t* bits, int64_t rows, int64_t columns, int64_t group_rows, int64_t width,
                              int32_t* starts, uint16_t* live);
void gapfx_convolution_forward(const gapfx::convolution::Geometry* g, const gapfx::convolution::Live* live,
                               const void* x, int is_bfloat16, const float* values, const float* bias, void* out,
                               int threads);
void gapfx_convolution_of_input(const gapfx::convolution::Geometry* g, const gapfx::convolution::Live* live,
                                const void* gradient, int is_bfloat16, const float* values, void* of_input, int threads);
void gapfx_convolution_of_values(const gapfx::convolution::Geometry* g, const gapfx::convolution::Live* live,
                                 const void* x, const void* gradient, int is_bfloat16, float* of_values, int threads);
int gapfx_level();
int gapfx_decode_has_masked(int type);
int gapfx_decode(const gapfx::decode::Layout* weight, const void* x, int count, const void* bias, void* y, int is_half,
                 int by_number, int threads);
void gapfx_histogram(const void* scores, int64_t numel, int kind, int64_t high, int64_t* counts, int threads);
void gapfx_mark(const void* scores, int64_t numel, int kind, uint32_t key, int64_t ties, uint8_t* mask, int threads);
int64_t gapfx_num_nan(const void* scores, int64_t numel, int kind, int threads);
}

namespace {

uint32_t state = 1;

uint32_t random_word() { return state = state * 1664525u + 1013904223u; }

bool chance(int percent) { return static_cast<int>((random_word() >> 8) % 100) < percent; }

// Packed bits of a mask of rows of `columns`, each row repeated `block` times.
std::vector<uint8_t> some_bits(int64_t rows, int64_t columns, int64_t block, int percent) {
  std::vector<uint8_t> bits((rows * columns + 7) / 8);
  for (int64_t row = 0; row < rows; row += block)
    for (int64_t column = 0; column < columns; ++column)
      if (chance(percent))
        for (int64_t i = 0; i < block; ++i) {
          const int64_t at = (row + i) * columns + column;
          bits[at / 8] |= static_cast<uint8_t>(1 << at % 8);
        }
  return bits;
}

// Elements of `size` bytes with small numbers in every format.
std::vector<uint8_t> some_data(int64_t numel, int size) {
  std::vector<uint8_t> data(numel * size);
  for (int64_t i = 0; i < numel; ++i) data[i * size + size - 1] = static_cast<uint8_t>(0x3e + i % 2);
  return data;
}

// A pointer that holds for an empty buffer too.
template <typename T>
T* start(std::vector<T>& data) {
  static T nothing[1];
  return data.empty() ? nothing : data.data();
}

void expand_and_gather() {
  for (int64_t numel : {1, 7, 8, 9, 31, 33, 63, 64, 65, 129, 1000, 70001})
    for (int percent : {0, 10, 50, 100})
      for (int size : {2, 4, 8})
        for (int threads : {1, 3}) {
          auto bits = some_bits(1, numel, 1, percent);
          auto values = some_data(gapfx_count(bits.data(), numel), size), dense = some_data(numel, size);
          gapfx_expand(start(values), bits.data(), dense.data(), numel, size, threads);
          gapfx_gather(dense.data(), bits.data(), start(values), numel, size, threads);
        }
}

void pack_and_unpack() {
  for (int64_t numel : {0, 1, 7, 8, 9, 63, 64, 65, 129, 1000, (1 << 20) + 9})
    for (int threads : {1, 3}) {
      auto bits = some_bits(1, numel, 1, 50);
      const auto wanted = bits;
      std::vector<uint8_t> mask(numel);
      gapfx_unpack(start(bits), start(mask), numel, threads);
      gapfx_pack(start(mask), start(bits), numel, threads);
      if (bits != wanted) std::abort();
    }
}

void one_linear(int64_t outputs, int64_t inputs, int64_t wanted, int percent, int64_t tokens, int is_fp32, int threads) {
  auto bits = some_bits(outputs, inputs, wanted, percent);
  const int64_t block = gapfx_linear_has_blocks(bits.data(), outputs, inputs) ? 4 : 1;
  if (block < wanted) std::abort();
  const int64_t live = gapfx_count(bits.data(), outputs * inputs), tile = 48, tiles = (inputs + tile - 1) / tile;
  std::vector<uint16_t> columns(live / block + gapfx::linear::kSpare);
  const int64_t rows = outputs / block, turned_tile = 10, turned_tiles = (rows + turned_tile - 1) / turned_tile;
  std::vector<int32_t> starts((tiles + 1) * rows), turned_starts(turned_tiles * (inputs + 1));
  gapfx_linear_prepare(bits.data(), outputs, inputs, block, tile, turned_tile, columns.data(), starts.data(),
                       turned_starts.data());
  const gapfx::linear::Pattern pattern{rows, inputs, block, tiles, tile, rows, rows, columns.data(), starts.data()};
  const int size = is_fp32 ? 4 : 2;
  std::vector<float> values(live, 0.5f), bias(outputs, 1.0f), grad_values(live);
  auto x = some_data(tokens * inputs, size), y = some_data(tokens * outputs, size), grad_x = x;
  gapfx_linear_forward(&pattern, start(values), bias.data(), start(x), start(y), tokens, is_fp32, threads);
  gapfx_linear_forward(&pattern, start(values), nullptr, start(x), start(y), tokens, is_fp32, threads);
  gapfx_linear_backward(&pattern, turned_starts.data(), turned_tile, start(values), start(y), start(x), start(grad_x),
                        start(grad_values), tokens, is_fp32, threads);
}

void linear() {
  for (int64_t rows : {1, 5, 17, 65})
    for (int64_t inputs : {1, 15, 33, 130})
      for (int64_t block : {1, 4})
        for (int percent : {0, 3, 40, 100})
          for (int64_t tokens : {0, 1, 17, 47, 64, 130})
            for (int is_fp32 : {0, 1}) one_linear(rows * block, inputs, block, percent, tokens, is_fp32, 1 + rows % 3);
  for (int64_t block : {1, 4}) one_linear(516, 700, block, 10, 330, 1, 3);
}

// A convolution of `outputs` and `inputs` channels a group over images of 1 x height x width.
struct Case {
  int64_t groups, outputs, inputs, height, width, kernel, stride, padding, dilation;
};

void one_convolution(const Case& c, int64_t images, int64_t wanted, int percent, int is_bfloat16, int threads) {
  const auto out = [&](int64_t size) { return (size + 2 * c.padding - c.dilation * (c.kernel - 1) - 1) / c.stride + 1; };
  const int64_t rows = c.groups * c.outputs, columns = c.inputs * c.kernel * c.kernel, tile = 20;
  const gapfx::convolution::Geometry g{images, c.groups, c.groups * c.inputs, rows,
                                       {1, c.height, c.width}, {1, out(c.height), out(c.width)},
                                       {1, c.kernel, c.kernel}, {1, c.stride, c.stride},
                                       {0, c.padding, c.padding}, {1, c.dilation, c.dilation}};
  auto bits = some_bits(rows, columns, wanted, percent);
  const int64_t count = gapfx_count(bits.data(), rows * columns), tiles = (columns + tile - 1) / tile;
  std::vector<int32_t> starts(rows * tiles + 1);
  std::vector<uint16_t> places(count);
  const int is_blocked =
      gapfx_convolution_prepare(bits.data(), rows, columns, c.outputs, tile, starts.data(), start(places));
  if (wanted == 4 && !is_blocked) std::abort();
  const gapfx::convolution::Live live{starts.data(), start(places), tiles, tile, is_blocked};
  const int size = is_bfloat16 ? 2 : 4;
  std::vector<float> values(count, 0.5f), bias(rows, 1.0f), grad_values(count);
  auto x = some_data(images * g.inputs * c.height * c.width, size), grad_x = x;
  auto y = some_data(images * rows * g.output[1] * g.output[2], size);
  gapfx_convolution_forward(&g, &live, start(x), is_bfloat16, start(values), bias.data(), start(y), threads);
  gapfx_convolution_forward(&g, &live, start(x), is_bfloat16, start(values), nullptr, start(y), threads);
  gapfx_convolution_of_input(&g, &live, start(y), is_bfloat16, start(values), start(grad_x), threads);
  gapfx_convolution_of_values(&g, &live, start(x), start(y), is_bfloat16, start(grad_values), threads);
}

void convolution() {
  const Case cases[] = {
      {1, 4, 1, 1, 1, 1, 1, 0, 1},  {1, 8, 3, 5, 7, 3, 1, 1, 1}, {2, 4, 5, 9, 8, 3, 2, 1, 1},  {1, 12, 21, 8, 8, 1, 1, 0, 1},
      {3, 4, 2, 11, 6, 2, 3, 2, 2}, {1, 4, 2, 6, 6, 5, 4, 2, 1}, {4, 4, 1, 10, 10, 3, 1, 1, 1}, {1, 16, 9, 3, 33, 3, 1, 0, 1},
  };
  for (const Case& each : cases)
    for (int64_t images : {0, 1, 3})
      for (int64_t block : {1, 4})
        for (int percent : {0, 5, 50, 100})
          for (int is_bfloat16 : {0, 1}) one_convolution(each, images, block, percent, is_bfloat16, 1 + percent % 3);
}

void one_decode(int64_t outputs, int64_t inputs, int percent, int type, int count, int is_half, int threads) {
  namespace decode = gapfx::decode;
  const int64_t words_of_row = (inputs + decode::kWord - 1) / decode::kWord;
  std::vector<uint64_t> words(outputs * words_of_row);
  std::vector<uint16_t> columns;
  std::vector<int64_t> starts(1);
  for (int64_t row = 0; row < outputs; ++row) {
    for (int64_t column = 0; column < inputs; ++column)
      if (chance(percent)) {
        words[row * words_of_row + column / decode::kWord] |= uint64_t{1} << column % decode::kWord;
        columns.push_back(static_cast<uint16_t>(column));
      }
    starts.push_back(static_cast<int64_t>(columns.size()));
  }
  columns.shrink_to_fit();
  const int size = type == decode::kFloat ? 4 : type == decode::kHalf ? 2 : 1, element = is_half ? 2 : 4;
  auto values = some_data(starts.back() + decode::kSpare, size), x = some_data(count * inputs, element);
  auto y = some_data(count * outputs, element), bias = some_data(outputs, element);
  std::vector<float> scales(outputs, 0.5f);
  std::vector<int32_t> totals(outputs, 3);
  for (int form : {1, 2, 3}) {  // by masks, by columns, with both
    const decode::Layout layout{outputs, inputs, form & 1 ? words.data() : nullptr, form & 2 ? start(columns) : nullptr,
                                starts.data(), values.data(), scales.data(), totals.data(), type};
    for (int by_number : {0, 1})
      if (!by_number || form & 2) {
        if (gapfx_decode(&layout, x.data(), count, bias.data(), y.data(), is_half, by_number, threads)) std::abort();
        gapfx_decode(&layout, x.data(), count, nullptr, y.data(), is_half, by_number, threads);
      }
  }
}

void decode() {
  for (int64_t outputs : {1, 3, 4, 9, 33})
    for (int64_t inputs : {1, 63, 64, 65, 200, 256})
      for (int percent : {0, 10, 60, 100})
        for (int type : {0, 1, 2})
          for (int count : {1, 2, 5, 8, 9, 15})
            for (int is_half : {0, 1}) one_decode(outputs, inputs, percent, type, count, is_half, 1);
  for (int type : {0, 1, 2}) {
    one_decode(300, 700, 50, type, 2, 0, 3);
    if (gapfx_decode_has_masked(type) && gapfx_level() < 2) std::abort();
  }
}

void threshold() {
  std::vector<int64_t> counts(65536);
  for (int64_t numel : {0, 1, 7, 15, 16, 17, 33, 63, 64, 65, 1000, 70001})
    for (int kind : {0, 1, 2})
      for (int threads : {1, 3}) {
        auto scores = some_data(numel, kind == 1 ? 2 : 4);
        std::vector<uint8_t> mask(numel);
        for (int64_t high : {int64_t{-1}, int64_t{0}, int64_t{0xbe00}, int64_t{0xffff}})
          gapfx_histogram(start(scores), numel, kind, high, counts.data(), threads);
        for (uint32_t key : {0u, 0xbe000000u, 0xffffffffu})
          for (int64_t ties : {int64_t{0}, numel / 2, numel})
            gapfx_mark(start(scores), numel, kind, key, ties, start(mask), threads);
        gapfx_num_nan(start(scores), numel, kind, threads);
      }
}

struct Family {
  const char* name;
  void (*run)();
};

const Family families[] = {
    {"expand and gather", expand_and_gather},
    {"pack and unpack", pack_and_unpack},
    {"linear", linear},
    {"convolution", convolution},
    {"decode", decode},
    {"threshold", threshold},
};

}  // namespace

int main(int, char** arguments) {
  const int level = std::atoi(arguments[1]);
  if (gapfx_use_level(level) != level) {
    std::puts("this processor lacks the instructions");
    return 0;
  }
  for (const Family& family : families) {
    std::puts(family.name);
    family.run();
  }
  std::puts("done");
}
