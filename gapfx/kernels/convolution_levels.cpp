// The kernels of a sparse convolution at each level of instructions, and where the lanes of a panel are.

#include <cstring>

#include "convolution.h"

#if GAPFX_X86
#include <immintrin.h>
// GCC says so of its own "undefined" vectors.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace gapfx {
namespace convolution {

namespace portable {
namespace {
#define GAPFX_WIDTH 4
#define GAPFX_SUMS 8
#define GAPFX_EVERY 0
#include "convolution_body.h"
#undef GAPFX_WIDTH
#undef GAPFX_SUMS
#undef GAPFX_EVERY
}  // namespace
}  // namespace portable

#if GAPFX_X86

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
namespace {
#define GAPFX_WIDTH 8
#define GAPFX_SUMS 8
#define GAPFX_EVERY 0
#include "convolution_body.h"
#undef GAPFX_WIDTH
#undef GAPFX_SUMS
#undef GAPFX_EVERY
}  // namespace
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
namespace avx512 {
namespace {
#define GAPFX_WIDTH 16
#define GAPFX_SUMS 16
#define GAPFX_EVERY 1
#include "convolution_body.h"
#undef GAPFX_WIDTH
#undef GAPFX_SUMS
#undef GAPFX_EVERY
}  // namespace
}  // namespace avx512
#pragma GCC pop_options

#endif

const Kernels& kernels() {
#if GAPFX_X86
  if (level() == kAvx512) return avx512::all;
  if (level() == kAvx2) return avx2::all;
#endif
  return portable::all;
}

namespace {

// The lanes of a vector in as few pieces of 32 places as lie in order.
void set_vector(const int64_t* places, int lanes, VectorOfLanes* vector) {
  vector->num_pieces = 0;
  vector->is_run = lanes == kVector;
  Piece* piece = nullptr;
  for (int lane = 0; lane < lanes; ++lane) {
    if (lane && places[lane] != places[lane - 1] + 1) vector->is_run = false;
    if (!piece || places[lane] < piece->base || places[lane] >= piece->base + 2 * kVector) {
      piece = vector->pieces + vector->num_pieces++;
      *piece = Piece{places[lane], {}, 0, 0, 0};
    }
    const int index = static_cast<int>(places[lane] - piece->base);
    piece->index[lane] = index;
    piece->lanes |= 1u << lane;
    (index < kVector ? piece->low : piece->high) |= 1u << (index % kVector);
  }
}

}  // namespace

void Panel::set(const int64_t* places, int lanes) {
  count = lanes;
  vectors = (lanes + kVector - 1) / kVector;
  num_runs = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    if (!lane || places[lane] != places[lane - 1] + 1) runs[num_runs++] = Run{lane, 0, places[lane]};
    ++runs[num_runs - 1].size;
  }
  for (int v = 0; v < vectors; ++v) {
    const int first = v * kVector;
    set_vector(places + first, lanes - first < kVector ? lanes - first : kVector, in_vectors + v);
  }
}

}  // namespace convolution
}  // namespace gapfx
