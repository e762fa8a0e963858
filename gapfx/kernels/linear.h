// A sparse weight [outputs, inputs] as the kernels of a linear layer read it, and the table of its kernels.

#pragma once

#include <cstdint>

namespace gapfx::linear {

constexpr int kPanel = 64;      // tokens of a whole panel
constexpr int kPanelStep = 16;  // a narrow panel has a multiple of this many lanes
constexpr int kBlock = 4;       // rows that share their columns, where they do
constexpr int kAlign = 4;       // entries that a loop takes at a time
constexpr int kSpare = 16;      // columns that stand behind the last one, to be read and not used

// Where the live weights are. Where `block` is 4, a row here stands for four consecutive outputs with the same live
// columns; else 1. Columns are cut into tiles of `tile`; the entries of row `r` in tile `t` are those from
// starts[t * tile_step + r] to starts[t * tile_step + r + next].
//
// A weight has them in row-major order, as its values: a tile's border is moved to a multiple of kAlign entries of the
// row, so that few loops have a rest, and some entries are of the tile before. The transposed one has them tile by tile.
struct Pattern {
  int64_t rows, inputs, block, tiles, tile, tile_step, next;
  const uint16_t* columns;
  const int32_t* starts;
};

// Tokens of one panel and their values, [features][width]; lanes beyond the tokens are 0.
struct Panel {
  float* data;
  int width;
};

// What the sum over tokens runs over: whole panels that follow each other in memory, then at most one narrow one.
struct Strips {
  const float *x, *gradient;
  int64_t x_stride, gradient_stride;
  int num_whole, rest;  // rest: the width of the narrow one, or 0
};

struct Kernels {
  // x [tokens][stride] of `type` -> panel [features][width].
  void (*pack[2])(const void* x, int64_t stride, int tokens, int64_t features, Panel panel);
  // Rows of a panel -> y [tokens][stride].
  void (*unpack[2])(Panel panel, int64_t features, void* y, int64_t stride, int tokens);
  // y [row of begin..end][width] = bias + weight @ x. One output a row; four; four inputs an entry.
  void (*product)(const Pattern&, const float* values, const float* bias, Panel x, int64_t begin, int64_t end, float* y);
  void (*block_product)(const Pattern&, const float* values, const float* bias, Panel x, int64_t begin, int64_t end,
                        float* y);
  void (*turned_block_product)(const Pattern&, const float* values, const float* bias, Panel x, int64_t begin,
                               int64_t end, float* y);
  // gradients of the values of rows [begin, end), added to what is there.
  void (*gradient)(const Pattern&, const Strips&, int64_t begin, int64_t end, float* values);
  void (*block_gradient)(const Pattern&, const Strips&, int64_t begin, int64_t end, float* values);
};

}  // namespace gapfx::linear
