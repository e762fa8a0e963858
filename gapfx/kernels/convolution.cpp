// A convolution whose weight has few live values: forward, gradient of the input, gradient of the live values.

#include "convolution.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "convolution_lanes.h"

namespace gapfx {
namespace convolution {
namespace {

constexpr int64_t kMaxColumns = 384;  // of a tile of the transposed weight: 96 KB of a panel

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

// Floats on a cache line's border.
using Floats = std::unique_ptr<float, Free>;
Floats floats(int64_t count) {
  return Floats(static_cast<float*>(std::aligned_alloc(64, (std::max<int64_t>(count, 1) * 4 + 63) / 64 * 64)));
}

// A matrix of each group, one after another: rows x columns, and where its columns read.
struct Matrix {
  Live live;
  const float* values;
  int64_t groups, rows, columns;
  std::vector<int64_t> offsets;  // of the columns of a group
  int64_t channels;              // that a group reads
  int64_t taps;                  // columns of each

  Tile tile(int64_t group, int64_t row, int64_t size, int64_t tile) const {
    return Tile{live.starts + (group * rows + row) * live.tiles + tile, live.tiles, size, live.columns};
  }
  Columns columns_of(int64_t tile) const {
    const int64_t first = tile * live.width;
    return Columns{offsets.data() + first, std::min(live.width, columns - first), taps, taps - 1 - first % taps};
  }
};

// Panels of one thread, or rows of them where there are fewer panels than threads.
struct Share {
  int64_t first_panel, panels, first_row, rows;
};

Share share_of(int64_t panels, int64_t rows, int threads, int index) {
  const int64_t parts = panels >= threads ? 1 : std::min<int64_t>((threads + panels - 1) / panels,
                                                                 std::max<int64_t>(rows / 16, 1));
  const int64_t teams = std::max<int64_t>(threads / parts, 1), team = index / parts, part = index % parts;
  if (team >= teams) return Share{0, 0, 0, 0};
  const int64_t first = panels * team / teams, begin = rows / 4 * part / parts * 4;
  const int64_t end = part + 1 == parts ? rows : rows / 4 * (part + 1) / parts * 4;
  return Share{first, panels * (team + 1) / teams - first, begin, end - begin};
}

void multiply_share(const Share& share, const Images& from, const Reading& reading, const Matrix& matrix,
                    const float* bias, const Images& to, const Writing& writing) {
  if (!share.panels || !share.rows) return;
  const Kernels& use = kernels();
  const int64_t lanes = from.images * reading.lanes_per_image();
  const Floats tile = floats(std::min(matrix.live.width, matrix.columns) * kLanes), sums = floats(share.rows * kLanes);
  Reader reader(from, reading);
  const auto panel = std::make_unique<Panel>();
  for (int64_t p = share.first_panel; p < share.first_panel + share.panels; ++p) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, lanes - p * kLanes));
    reader.set(p * kLanes, count, panel.get());
    for (int64_t group = 0; group < matrix.groups; ++group) {
      const float* planes = reader.planes() + group * matrix.channels * reader.plane();
      const float* first = bias ? bias + group * matrix.rows + share.first_row : nullptr;
      for (int64_t t = 0; t < matrix.live.tiles; ++t) {
        use.extract(*panel, planes, matrix.columns_of(t), tile.get());
        (matrix.live.is_blocked ? use.multiply_blocks : use.multiply)(
            matrix.tile(group, share.first_row, share.rows, t), matrix.values, tile.get(), panel->vectors, t == 0, first,
            sums.get());
      }
      write(sums.get(), group * matrix.rows + share.first_row, share.rows, reading, writing, to, p * kLanes, count);
    }
  }
}

// to = matrix x the columns that it reads of `from`.
void multiply_all(const Images& from, const Reading& reading, const Matrix& matrix, const float* bias, const Images& to,
                  const Writing& writing, int threads) {
  const int64_t panels = (from.images * reading.lanes_per_image() + kLanes - 1) / kLanes;
  if (!panels) return;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int index = 0; index < threads; ++index)
    multiply_share(share_of(panels, matrix.rows, threads, index), from, reading, matrix, bias, to, writing);
}

Reading forward_reading(const Geometry& g) {
  Reading reading;
  for (int d = 0; d < kDims; ++d) {
    reading.grid[d] = g.output[d];
    reading.step[d] = g.stride[d];
    reading.low[d] = g.padding[d];
    const int64_t needed = (g.output[d] - 1) * g.stride[d] + (g.kernel[d] - 1) * g.dilation[d] + 1;
    // Planes that need no padding are read where they are.
    reading.padded[d] = g.padding[d] == 0 ? std::max(needed, g.input[d]) : needed;
  }
  return reading;
}

// A number for each tap of the kernel, from its place.
template <typename Of>
void each_tap(const Geometry& g, Of of) {
  int64_t tap[kDims];
  for (tap[0] = 0; tap[0] < g.kernel[0]; ++tap[0])
    for (tap[1] = 0; tap[1] < g.kernel[1]; ++tap[1])
      for (tap[2] = 0; tap[2] < g.kernel[2]; ++tap[2]) of(tap);
}

std::vector<int64_t> forward_offsets(const Geometry& g, const Reading& reading) {
  std::vector<int64_t> offsets;
  for (int64_t c = 0; c < g.inputs / g.groups; ++c)
    each_tap(g, [&](const int64_t* tap) {
      int64_t at[kDims];
      for (int d = 0; d < kDims; ++d) at[d] = tap[d] * g.dilation[d];
      offsets.push_back(c * reading.padded_plane() + reading.offset(at));
    });
  return offsets;
}

Matrix forward_matrix(const Geometry& g, const Live& live, const float* values, const Reading& reading) {
  return Matrix{live,        values, g.groups, g.outputs / g.groups, g.columns(), forward_offsets(g, reading),
                g.inputs / g.groups, g.taps()};
}

Images inputs_of(const Geometry& g, const void* data, bool is_bfloat16) {
  return Images{const_cast<void*>(data), is_bfloat16, g.images, g.inputs, {g.input[0], g.input[1], g.input[2]}};
}

Images outputs_of(const Geometry& g, const void* data, bool is_bfloat16) {
  return Images{const_cast<void*>(data), is_bfloat16, g.images, g.outputs, {g.output[0], g.output[1], g.output[2]}};
}

int64_t floor_divided(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// Input positions of one remainder by the stride: they see the output gradient through taps of their own.
struct Remainder {
  int64_t first[kDims];
  Reading reading;
  Writing writing;
  std::vector<int64_t> tap_of, offsets;  // of each tap: its number among those of this remainder, or -1; its offset
  int64_t num_taps = 0;
};

// How far the output position lies from input position i * stride + first, by this tap.
int64_t distance(const Geometry& g, const Remainder& r, const int64_t* tap, int d) {
  return floor_divided(r.first[d] + g.padding[d] - tap[d] * g.dilation[d], g.stride[d]);
}

bool sees(const Geometry& g, const Remainder& r, const int64_t* tap) {
  for (int d = 0; d < kDims; ++d)
    if ((r.first[d] + g.padding[d] - tap[d] * g.dilation[d]) % g.stride[d]) return false;
  return true;
}

void set_reading(const Geometry& g, Remainder* r) {
  int64_t lowest[kDims] = {0}, highest[kDims] = {0};
  each_tap(g, [&](const int64_t* tap) {
    if (!sees(g, *r, tap)) return;
    for (int d = 0; d < kDims; ++d) {
      lowest[d] = std::min(lowest[d], distance(g, *r, tap, d));
      highest[d] = std::max(highest[d], distance(g, *r, tap, d));
    }
  });
  for (int d = 0; d < kDims; ++d) {
    r->reading.grid[d] = std::max<int64_t>(0, (g.input[d] - r->first[d] + g.stride[d] - 1) / g.stride[d]);
    r->reading.step[d] = 1;
    r->reading.low[d] = -lowest[d];
    r->reading.padded[d] = std::max(r->reading.grid[d] + highest[d], g.output[d]) - lowest[d];
    r->writing.step[d] = g.stride[d];
    r->writing.first[d] = r->first[d];
  }
}

Remainder remainder_of(const Geometry& g, int64_t number) {
  Remainder r;
  for (int d = kDims; d-- > 0; number /= g.stride[d]) r.first[d] = number % g.stride[d];
  set_reading(g, &r);
  each_tap(g, [&](const int64_t* tap) {
    const bool is_seen = sees(g, r, tap);
    r.tap_of.push_back(is_seen ? r.num_taps++ : -1);
    if (!is_seen) return;
    int64_t at[kDims];
    for (int d = 0; d < kDims; ++d) at[d] = r.reading.low[d] + distance(g, r, tap, d);
    r.offsets.push_back(r.reading.offset(at));
  });
  return r;
}

// The weight transposed, of one remainder: a row for each input channel, a column for each (output channel, tap).
class Transposed {
 public:
  Transposed(const Geometry& g, const Live& live, const float* values, const Remainder& r)
      : g_(g), live_(live), r_(r), outputs_(g.outputs / g.groups), inputs_(g.inputs / g.groups) {
    columns_ = outputs_ * r.num_taps;
    tiles_ = std::max<int64_t>(1, (columns_ + kMaxColumns - 1) / kMaxColumns);
    width_ = std::max((columns_ + tiles_ - 1) / tiles_, r.num_taps);
    starts_.assign(g.inputs * tiles_ + 2, 0);
    each([&](int64_t cell, int64_t, int64_t) { ++starts_[cell + 2]; });
    for (size_t i = 2; i < starts_.size(); ++i) starts_[i] += starts_[i - 1];
    values_ = floats(starts_.back());
    live_columns_.resize(starts_.back());
    each([&](int64_t cell, int64_t column, int64_t j) {
      const int32_t at = starts_[cell + 1]++;
      values_.get()[at] = values[j];
      live_columns_[at] = static_cast<uint16_t>(column);
    });
  }

  Matrix matrix() const {
    std::vector<int64_t> offsets;
    for (int64_t o = 0; o < outputs_; ++o)
      for (int64_t offset : r_.offsets) offsets.push_back(o * r_.reading.padded_plane() + offset);
    const Live live{starts_.data(), live_columns_.data(), tiles_, width_, 0};
    return Matrix{live, values_.get(), g_.groups, inputs_, columns_, offsets, outputs_, std::max<int64_t>(r_.num_taps, 1)};
  }

 private:
  // use(number of (row, tile), column in the tile, live weight) for each live weight of the remainder, by row.
  template <typename Use>
  void each(Use use) {
    const int64_t taps = g_.taps();
    std::vector<int32_t> tap_of, cell_of;  // of each column of the weight
    for (int64_t k = 0; k < inputs_ * taps; ++k) {
      tap_of.push_back(static_cast<int32_t>(r_.tap_of[k % taps]));
      cell_of.push_back(static_cast<int32_t>(k / taps * tiles_));
    }
    for (int64_t o = 0; o < g_.outputs; ++o) {
      // Taps of an output may lie in two tiles: those from `border` on in the second.
      const int64_t first = o % outputs_ * r_.num_taps, tile = width_ ? first / width_ : 0;
      const int64_t begin = first - tile * width_, border = width_ - begin, cell = o / outputs_ * inputs_ * tiles_ + tile;
      for (int64_t t = 0; t < live_.tiles; ++t)
        for (int64_t j = live_.starts[o * live_.tiles + t]; j < live_.starts[o * live_.tiles + t + 1]; ++j) {
          const int64_t k = t * live_.width + live_.columns[j], tap = tap_of[k];
          if (tap < 0) continue;
          const bool is_second = tap >= border;
          use(cell + cell_of[k] + is_second, begin + tap - (is_second ? width_ : 0), j);
        }
    }
  }

  const Geometry& g_;
  const Live& live_;
  const Remainder& r_;
  int64_t outputs_, inputs_, columns_, tiles_, width_;
  std::vector<int32_t> starts_;  // the starts are the ones from 0 on, once each cell is filled
  Floats values_;
  std::vector<uint16_t> live_columns_;
};

// Units of work (group, tile) of one thread; every panel in order, so that sums do not depend on the threads.
void dots_share(int64_t begin, int64_t end, const Geometry& g, const Images& from, const Matrix& matrix,
                const Reading& reading, const Images& gradient, float* values) {
  if (begin >= end) return;
  const Kernels& use = kernels();
  Reading same = reading;
  for (int d = 0; d < kDims; ++d) same.step[d] = 1, same.low[d] = 0, same.padded[d] = g.output[d];
  std::vector<int64_t> channels(matrix.rows);
  for (int64_t o = 0; o < matrix.rows; ++o) channels[o] = o * gradient.plane();
  const Floats tile = floats(std::min(matrix.live.width, matrix.columns) * kLanes), sums = floats(matrix.rows * kLanes);
  Reader reader(from, reading), of_gradient(gradient, same);
  const auto panel = std::make_unique<Panel>(), gradient_panel = std::make_unique<Panel>();
  const int64_t lanes = g.images * reading.lanes_per_image(), tiles = matrix.live.tiles;
  for (int64_t p = 0; p * kLanes < lanes; ++p) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, lanes - p * kLanes));
    reader.set(p * kLanes, count, panel.get());
    of_gradient.set(p * kLanes, count, gradient_panel.get());
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit / tiles, t = unit % tiles;
      if (unit == begin || t == 0)
        use.extract(*gradient_panel, of_gradient.planes() + group * matrix.rows * of_gradient.plane(),
                    Columns{channels.data(), matrix.rows, 1, 0}, sums.get());
      use.extract(*panel, reader.planes() + group * matrix.channels * reader.plane(),
                  matrix.columns_of(t), tile.get());
      use.dots(matrix.tile(group, 0, matrix.rows, t), tile.get(), sums.get(), panel->vectors, p == 0, values);
    }
  }
}

}  // namespace
}  // namespace convolution
}  // namespace gapfx

using namespace gapfx::convolution;

// Finds the live weights in the bits of a weight [rows, columns], in tiles of `width` columns: starts [rows * tiles + 1]
// and columns, one for each 1 bit. Returns 1 where rows 4 i to 4 i + 3 of `group_rows` have the same columns, else 0.
GAPFX_API int gapfx_convolution_prepare(const uint8_t* bits, int64_t rows, int64_t columns, int64_t group_rows,
                                        int64_t width, int32_t* starts, uint16_t* live) {
  const int64_t tiles = (columns + width - 1) / width;
  int32_t found = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t t = 0; t < tiles; ++t) {
      starts[row * tiles + t] = found;
      const int64_t first = row * columns + t * width, end = row * columns + std::min(columns, (t + 1) * width);
      for (int64_t at = first; at < end; ++at)
        if (bits[at >> 3] >> (at & 7) & 1) live[found++] = static_cast<uint16_t>(at - first);
    }
  starts[rows * tiles] = found;
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t *mine = starts + row * tiles, *first = starts + row / 4 * 4 * tiles;
    if (group_rows % 4 || mine[tiles] - mine[0] != first[tiles] - first[0]) return 0;
    for (int64_t t = 0; t < tiles; ++t)
      if (mine[t] - mine[0] != first[t] - first[0]) return 0;
    if (!std::equal(live + mine[0], live + mine[tiles], live + first[0])) return 0;
  }
  return 1;
}

GAPFX_API void gapfx_convolution_forward(const Geometry* g, const Live* live, const void* x, int is_bfloat16,
                                         const float* values, const float* bias, void* out, int threads) {
  const Reading reading = forward_reading(*g);
  const Writing writing = {{1, 1, 1}, {0, 0, 0}};
  multiply_all(inputs_of(*g, x, is_bfloat16), reading, forward_matrix(*g, *live, values, reading), bias,
               outputs_of(*g, out, is_bfloat16), writing, threads);
}

GAPFX_API void gapfx_convolution_of_input(const Geometry* g, const Live* live, const void* gradient, int is_bfloat16,
                                          const float* values, void* of_input, int threads) {
  const Images to = inputs_of(*g, of_input, is_bfloat16);
  bool is_zero = false;
  for (int64_t number = 0; number < g->stride[0] * g->stride[1] * g->stride[2]; ++number)
    if (!is_zero && !remainder_of(*g, number).num_taps) is_zero = true, std::memset(of_input, 0, to.bytes());
  for (int64_t number = 0; number < g->stride[0] * g->stride[1] * g->stride[2]; ++number) {
    const Remainder r = remainder_of(*g, number);
    if (!r.reading.lanes_per_image() || !r.num_taps) continue;
    const Transposed transposed(*g, *live, values, r);
    multiply_all(outputs_of(*g, gradient, is_bfloat16), r.reading, transposed.matrix(), nullptr, to, r.writing, threads);
  }
}

GAPFX_API void gapfx_convolution_of_values(const Geometry* g, const Live* live, const void* x, const void* gradient,
                                           int is_bfloat16, float* of_values, int threads) {
  const Reading reading = forward_reading(*g);
  const Matrix matrix = forward_matrix(*g, *live, nullptr, reading);
  const int64_t units = g->groups * live->tiles;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int index = 0; index < threads; ++index)
    dots_share(units * index / threads, units * (index + 1) / threads, *g, inputs_of(*g, x, is_bfloat16), matrix, reading,
               outputs_of(*g, gradient, is_bfloat16), of_values);
}
