// Convolution with a sparse weight: what its parts share.
//
// Lanes are output positions, all images one after another, 64 to a panel. A weight is a matrix: a row for each output
// channel of a group, a column for each (input channel, tap). The columns that a tile of the matrix reads are copied out
// of zero-padded planes, 64 lanes each, and stay in cache while each row multiplies its live weights with them.

#pragma once

#include <cstdint>

#include "cpu.h"

namespace gapfx {
namespace convolution {

constexpr int kLanes = 64;   // of a panel
constexpr int kVector = 16;  // lanes that are copied together
constexpr int kDims = 3;     // of space; missing ones have size 1

// What a convolution is, as given by the caller.
struct Geometry {
  int64_t images, groups, inputs, outputs;
  int64_t input[kDims], output[kDims], kernel[kDims], stride[kDims], padding[kDims], dilation[kDims];

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t columns() const { return inputs / groups * taps(); }
};

// Live weights of a matrix in tiles of columns. Those of (row, tile) are at starts[row * tiles + tile] and up to the next
// start; a column counts from the start of its tile.
struct Live {
  const int32_t* starts;
  const uint16_t* columns;
  int64_t tiles, width;
  int64_t is_blocked;  // rows 4 i to 4 i + 3 have the same live columns
};

// Lanes [0, 16) of a vector that one or two neighbouring vectors of the planes hold.
struct Piece {
  int64_t base;         // lane i is at base + index[i]
  int32_t index[kVector];
  uint16_t lanes;       // which lanes it has
  uint16_t low, high;   // which of the 32 places are read
};

struct VectorOfLanes {
  int num_pieces;
  bool is_run;  // one whole vector, in order
  Piece pieces[kVector];
};

// Consecutive lanes at consecutive places.
struct Run {
  int lane, size;
  int64_t at;
};

// Where the lanes of a panel are.
struct Panel {
  int count, vectors, num_runs;
  Run runs[kLanes];
  VectorOfLanes in_vectors[kLanes / kVector];

  // From the place of each lane.
  void set(const int64_t* places, int lanes);
};

// Columns of a tile: their offsets, how many each plane has, and the first that is the last of its plane.
struct Columns {
  const int64_t* offsets;
  int64_t count, taps, last_tap;
};

// One tile of one row range, as the kernels take it.
struct Tile {
  const int32_t* starts;  // of the first row; the next row's are `stride` further
  int64_t stride, rows;
  const uint16_t* columns;
};

// The kernels at one level of instructions.
struct Kernels {
  // tile[column][lane] = planes[offset of the column + place of the lane]; 0 in lanes beyond the last, to a whole vector.
  void (*extract)(const Panel& panel, const float* planes, const Columns& columns, float* tile);
  // sums[row][lane] (+)= values x tile; begins with `bias` (or 0) where it `begins`.
  void (*multiply)(const Tile& tile, const float* values, const float* columns, int vectors, bool begins,
                   const float* bias, float* sums);
  // The same where four rows share their columns.
  void (*multiply_blocks)(const Tile& tile, const float* values, const float* columns, int vectors, bool begins,
                          const float* bias, float* sums);
  // values[j] (+)= the sum over lanes of gradient[row] x the column of weight j.
  void (*dots)(const Tile& tile, const float* columns, const float* gradient, int vectors, bool begins, float* values);
};

const Kernels& kernels();

}  // namespace convolution
}  // namespace gapfx
