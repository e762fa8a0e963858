// Where lanes and columns of a convolution read and write.

#pragma once

#include <cstdint>
#include <vector>

#include "convolution.h"

namespace gapfx {
namespace convolution {

// bfloat16 rounded to nearest even, NaN kept.
inline uint16_t to_bfloat16(float value) {
  uint32_t word;
  __builtin_memcpy(&word, &value, 4);
  if ((word & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(word >> 16 | 0x40);
  return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline float to_float(uint16_t word) {
  const uint32_t wide = static_cast<uint32_t>(word) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

inline void put(float value, float* at) { *at = value; }
inline void put(float value, uint16_t* at) { *at = to_bfloat16(value); }

// A tensor of images [images][channels][size], contiguous.
struct Images {
  void* data;
  bool is_bfloat16;
  int64_t images, channels;
  int64_t size[kDims];

  int64_t plane() const { return size[0] * size[1] * size[2]; }
  int64_t bytes() const { return images * channels * plane() * (is_bfloat16 ? 2 : 4); }
};

// How a grid of lanes reads images: lane (n, i) is at i * step in planes padded with zeros, `low` of them before each
// dimension; columns add an offset.
struct Reading {
  int64_t grid[kDims], step[kDims], low[kDims], padded[kDims];

  int64_t lanes_per_image() const { return grid[0] * grid[1] * grid[2]; }
  int64_t offset(const int64_t* at) const { return (at[0] * padded[1] + at[1]) * padded[2] + at[2]; }
  int64_t padded_plane() const { return padded[0] * padded[1] * padded[2]; }
};

// How a grid of lanes writes images: lane (n, i) goes to i * step + first.
struct Writing {
  int64_t step[kDims], first[kDims];
};

// Reads images panel after panel: pads the planes of an image when the first panel needs it.
class Reader {
 public:
  Reader(const Images& images, const Reading& reading);

  // Lanes [first, first + count) of all; panels must come in order.
  void set(int64_t first, int count, Panel* panel);
  const float* planes() const { return is_in_place_ ? static_cast<const float*>(images_.data) : padded_.data(); }
  // Between two channels.
  int64_t plane() const { return reading_.padded_plane(); }

 private:
  void pad(int64_t image);

  Images images_;
  Reading reading_;
  bool is_in_place_;
  int64_t slots_, next_ = 0;
  std::vector<float> padded_;
};

// sums[channel][lane] of `channels` channels from `channel` on go to their places.
void write(const float* sums, int64_t channel, int64_t channels, const Reading& reading, const Writing& writing,
           const Images& images, int64_t first, int count);

}  // namespace convolution
}  // namespace gapfx
