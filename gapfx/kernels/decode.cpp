// Products of few tokens (1 to 15) with a sparse weight, for inference. Plain C ABI; see decode.h for the layout.

#include "decode.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu.h"

#if GAPFX_X86
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of gcc 12's own headers
#include <immintrin.h>
#endif

namespace gapfx::decode {

namespace {

constexpr int64_t kParallelFrom = 1 << 16;  // live values times tokens from which threads pay

// Memory on a line of the cache, without values in it.
template <typename T>
struct Room {
  explicit Room(int64_t size)
      : data(size ? static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 63) / 64 * 64)) : nullptr) {}
  ~Room() { std::free(data); }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  T* const data;
};

inline float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t narrowed(float wide) {
  uint32_t bits;
  std::memcpy(&bits, &wide, 4);
  if (wide != wide) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if GAPFX_X86
#include "decode_512.h"

const bool has_half = __builtin_cpu_supports("avx512bf16");
const bool has_byte = __builtin_cpu_supports("avx512vnni");
#endif

// How the tokens are read: as they are, by lanes, as bf16 or as bytes.
enum Reads { kPlain, kLanes, kHalves, kBytes };

struct Kernel {
  Rows rows;
  Reads reads;
};

// Whether rows of this type of values can be gone through under their mask here.
bool has_masked(int type) {
#if GAPFX_X86
  return level() == kAvx512 && (type == kHalf ? has_half : type == kByte ? has_byte : true);
#else
  (void)type;
  return false;
#endif
}

// `by_number`: whether to go by the numbers of live columns where a mask is there too.
Kernel kernel_for(const Layout& w, int count, bool by_number) {
#if GAPFX_X86
  if (w.words && !by_number && has_masked(w.type)) {
    if (w.type == kByte) return {avx512::masked_bytes, kBytes};
    if (w.type == kHalf) return {avx512::masked_halves, kHalves};
    return {avx512::masked_floats, kPlain};
  }
#else
  (void)by_number;
#endif
  return {numbered_rows(), count == 1 ? kPlain : kLanes};
}

inline float value_at(const void* x, int64_t at, bool is_half) {
  return is_half ? widened(static_cast<const uint16_t*>(x)[at]) : static_cast<const float*>(x)[at];
}

void fill_plain(const void* x, bool is_half, int64_t inputs, const Tokens& to, float* plain) {
  for (int m = 0; m < to.count; ++m) {
    for (int64_t k = 0; k < inputs; ++k) plain[m * to.stride + k] = value_at(x, m * inputs + k, is_half);
    for (int64_t k = inputs; k < to.stride; ++k) plain[m * to.stride + k] = 0;
  }
}

void fill_lanes(const void* x, bool is_half, int64_t inputs, const Tokens& to, float* lanes) {
  for (int64_t k = 0; k < inputs; ++k)
    for (int m = 0; m < to.width; ++m)
      lanes[k * to.width + m] = m < to.count ? value_at(x, m * inputs + k, is_half) : 0;
}

void fill_halves(const void* x, bool is_half, int64_t inputs, const Tokens& to, uint16_t* halves) {
  std::memset(halves, 0, sizeof(uint16_t) * to.count * to.parts * to.stride);
  for (int m = 0; m < to.count; ++m) {
    uint16_t* near = halves + m * to.parts * to.stride;
    for (int64_t k = 0; k < inputs; ++k) {
      const float value = value_at(x, m * inputs + k, is_half);
      near[k] = narrowed(value);
      if (to.parts == 2) near[to.stride + k] = std::isfinite(value) ? narrowed(value - widened(near[k])) : 0;
    }
  }
}

// The largest magnitude of a token becomes 127. A token that is not finite makes all of its outputs NaN.
void fill_bytes(const void* x, bool is_half, int64_t inputs, const Tokens& to, uint8_t* bytes, float* steps) {
  for (int m = 0; m < to.count; ++m) {
    float top = 0;
    bool is_finite = true;
    for (int64_t k = 0; k < inputs; ++k) {
      const float value = std::fabs(value_at(x, m * inputs + k, is_half));
      is_finite &= std::isfinite(value);
      top = value > top ? value : top;
    }
    const float inverse = is_finite && top > 0 ? 127.0f / top : 0;
    steps[m] = is_finite ? top / 127.0f : NAN;
    for (int64_t k = 0; k < to.stride; ++k) {
      const float value = k < inputs && is_finite ? value_at(x, m * inputs + k, is_half) * inverse : 0;
      bytes[m * to.stride + k] = static_cast<uint8_t>(128 + static_cast<int>(std::nearbyint(value)));
    }
  }
}

// The same numbers of -127 ... 127, in fp32.
void fill_whole(const Tokens& from, int64_t inputs, float* whole) {
  for (int m = 0; m < from.count; ++m)
    for (int64_t k = 0; k < inputs; ++k)
      whole[m * inputs + k] = static_cast<float>(from.bytes[m * from.stride + k] - 128);
}

void finish(const Layout& w, const Tokens& x, const void* bias, bool is_half, const float* sums, void* y,
            int64_t begin, int64_t end) {
  for (int m = 0; m < x.count; ++m)
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = m * w.outputs + row;
      float value = x.steps ? sums[at] * x.steps[m] : sums[at];
      if (bias) value += value_at(bias, row, is_half);
      if (is_half)
        static_cast<uint16_t*>(y)[at] = narrowed(value);
      else
        static_cast<float*>(y)[at] = value;
    }
}

void product(const Layout& w, const void* x, int count, const void* bias, void* y, bool is_half, bool by_number,
             int threads) {
  const Kernel kernel = kernel_for(w, count, by_number);
  Tokens to{};
  to.count = count;
  to.stride = words_of(w) * kWord;
  to.width = width_of(count);
  to.parts = is_half ? 1 : 2;
  Room<uint8_t> bytes(w.type == kByte ? count * to.stride : 0);
  Room<float> whole(w.type == kByte && kernel.reads != kBytes ? count * w.inputs : 0);
  float steps[kMaxTokens];
  if (bytes.data) fill_bytes(x, is_half, w.inputs, to, bytes.data, steps), to.bytes = bytes.data, to.steps = steps;
  if (whole.data) fill_whole(to, w.inputs, whole.data);
  const void* given = whole.data ? whole.data : x;
  const bool is_given_half = is_half && !whole.data;
  const bool is_ready = kernel.reads == kPlain && !is_given_half && w.inputs == to.stride;
  Room<float> plain(kernel.reads == kPlain && !is_ready ? count * to.stride : 0);
  Room<float> lanes(kernel.reads == kLanes ? w.inputs * to.width : 0);
  Room<uint16_t> halves(kernel.reads == kHalves ? count * to.parts * to.stride : 0);
  Room<float> sums(is_half ? count * w.outputs : 0);
  if (is_ready) to.plain = static_cast<const float*>(given);
  if (plain.data) fill_plain(given, is_given_half, w.inputs, to, plain.data), to.plain = plain.data;
  if (lanes.data) fill_lanes(given, is_given_half, w.inputs, to, lanes.data), to.lanes = lanes.data;
  if (halves.data) fill_halves(x, is_half, w.inputs, to, halves.data), to.halves = halves.data;
  float* into = is_half ? sums.data : static_cast<float*>(y);
  const auto part = [&](int64_t begin, int64_t end) {
    kernel.rows(w, to, into, begin, end);
    if (is_half || bias || to.steps) finish(w, to, bias, is_half, into, y, begin, end);
  };
#ifdef _OPENMP
  if (threads > 1 && w.starts[w.outputs] * count >= kParallelFrom) {
#pragma omp parallel num_threads(threads)
    part(w.outputs * omp_get_thread_num() / omp_get_num_threads(),
         w.outputs * (omp_get_thread_num() + 1) / omp_get_num_threads());
    return;
  }
#else
  (void)threads;
#endif
  part(0, w.outputs);
}

}  // namespace

}  // namespace gapfx::decode

// y [count][outputs] = x [count][inputs] @ weight.T + bias, x, bias and y in fp32 or all in bf16 (`is_half`). `bias` may
// be null. Returns 0, or 1 for more than 15 tokens.
GAPFX_API int gapfx_decode(const gapfx::decode::Layout* weight, const void* x, int count, const void* bias, void* y,
                           int is_half, int by_number, int threads) {
  if (count < 1 || count > gapfx::decode::kMaxTokens) return 1;
  gapfx::decode::product(*weight, x, count, bias, y, is_half, by_number, threads);
  return 0;
}

// Whether there are kernels here that go by masks, for values of a type (0 fp32, 1 bf16, 2 int8).
GAPFX_API int gapfx_decode_has_masked(int type) { return gapfx::decode::has_masked(type); }
