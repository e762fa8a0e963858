// Kernels for few tokens in AVX-512: rows under a bit mask, and live columns by number with the tokens in lanes.

// Included by decode.cpp, in its namespace.

#pragma once

// gcc's order of instructions for processors in general makes rows of fp32, and them alone, take half as long again.
#define GAPFX_512_TUNED "tune=znver3," GAPFX_512
#define GAPFX_512 "avx2,fma,popcnt,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2"

namespace avx512 {

constexpr int kAhead = 1024;  // bytes that a stream is asked for before it is read

namespace floats {
#define GAPFX_LOOP __attribute__((target(GAPFX_512_TUNED), always_inline)) static inline
using Value = float;
using Token = float;
using Sum = __m512;

GAPFX_LOOP Sum zero() { return _mm512_setzero_ps(); }

// The places of all four quarters come from the word at once: one after another they would wait for each other.
template <int M, int PARTS>
GAPFX_LOOP void step(Sum (&sum)[M], uint64_t word, const Value* v, const Token* x, int64_t stride) {
  uint32_t high = static_cast<uint32_t>(word >> 32), second = static_cast<uint32_t>(word) >> 16, fourth = high >> 16;
  asm("" : "+r"(high), "+r"(second), "+r"(fourth));  // not by shifts of mask registers, which are slow
  const Value* third = v + _mm_popcnt_u32(static_cast<uint32_t>(word));
  const Value* at[4] = {v, v + _mm_popcnt_u32(static_cast<uint16_t>(word)), third,
                        third + _mm_popcnt_u32(static_cast<uint16_t>(high))};
  const __mmask16 live[4] = {static_cast<__mmask16>(word), static_cast<__mmask16>(second),
                             static_cast<__mmask16>(high), static_cast<__mmask16>(fourth)};
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) {
    const __m512 w = _mm512_maskz_expandloadu_ps(live[s], at[s]);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sum[m] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + m * stride + 16 * s), sum[m]);
  }
}

GAPFX_LOOP float total(const Layout&, int64_t, Sum sum) { return _mm512_reduce_add_ps(sum); }

#include "decode_rows.h"
#undef GAPFX_LOOP
}  // namespace floats

// A token in fp32 comes in two parts, the nearest bf16 and what it leaves, so that 16 bits of it count.
namespace halves {
#define GAPFX_LOOP __attribute__((target(GAPFX_512 ",avx512bf16"), always_inline)) static inline
using Value = uint16_t;
using Token = uint16_t;
using Sum = __m512;

GAPFX_LOOP Sum zero() { return _mm512_setzero_ps(); }

template <int M, int PARTS>
GAPFX_LOOP void step(Sum (&sum)[M], uint64_t word, const Value* v, const Token* x, int64_t stride) {
  const Value* at[2] = {v, v + _mm_popcnt_u32(static_cast<uint32_t>(word))};
#pragma GCC unroll 2
  for (int s = 0; s < 2; ++s) {
    const __m512bh w = (__m512bh)_mm512_maskz_expandloadu_epi16(static_cast<__mmask32>(word >> (32 * s)), at[s]);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Token* token = x + m * PARTS * stride + 32 * s;
      sum[m] = _mm512_dpbf16_ps(sum[m], w, (__m512bh)_mm512_loadu_si512(token));
      if (PARTS == 2) sum[m] = _mm512_dpbf16_ps(sum[m], w, (__m512bh)_mm512_loadu_si512(token + stride));
    }
  }
}

GAPFX_LOOP float total(const Layout&, int64_t, Sum sum) { return _mm512_reduce_add_ps(sum); }

#include "decode_rows.h"
#undef GAPFX_LOOP
}  // namespace halves

namespace bytes {
#define GAPFX_LOOP __attribute__((target(GAPFX_512 ",avx512vnni"), always_inline)) static inline
using Value = int8_t;
using Token = uint8_t;
using Sum = __m512i;

GAPFX_LOOP Sum zero() { return _mm512_setzero_si512(); }

template <int M, int PARTS>
GAPFX_LOOP void step(Sum (&sum)[M], uint64_t word, const Value* v, const Token* x, int64_t stride) {
  const __m512i w = _mm512_maskz_expandloadu_epi8(word, v);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) sum[m] = _mm512_dpbusd_epi32(sum[m], _mm512_loadu_si512(x + m * stride), w);
}

// The instruction takes one side without a sign: tokens are raised by 128, which the row's total takes back.
GAPFX_LOOP float total(const Layout& w, int64_t row, Sum sum) {
  return static_cast<float>(_mm512_reduce_add_epi32(sum) - 128 * w.totals[row]) * w.scales[row];
}

#include "decode_rows.h"
#undef GAPFX_LOOP
}  // namespace bytes

#define GAPFX_FN __attribute__((target(GAPFX_512))) static

__attribute__((target(GAPFX_512_TUNED))) static void masked_floats(const Layout& w, const Tokens& x, float* y,
                                                                   int64_t begin, int64_t end) {
  floats::tokens<1>(w, x.plain, x.stride, x.count, y, begin, end);
}

__attribute__((target(GAPFX_512 ",avx512bf16"))) static void masked_halves(const Layout& w, const Tokens& x, float* y,
                                                                          int64_t begin, int64_t end) {
  if (x.parts == 2) return halves::tokens<2>(w, x.halves, x.stride, x.count, y, begin, end);
  halves::tokens<1>(w, x.halves, x.stride, x.count, y, begin, end);
}

__attribute__((target(GAPFX_512 ",avx512vnni"))) static void masked_bytes(const Layout& w, const Tokens& x, float* y,
                                                                         int64_t begin, int64_t end) {
  bytes::tokens<1>(w, x.bytes, x.stride, x.count, y, begin, end);
}

// Numbers of the columns whose bit is 1; up to 32 more are written behind them.
GAPFX_FN inline int64_t columns_of(const uint64_t* word, int64_t words, uint16_t* columns) {
  alignas(64) static constexpr uint16_t kFirst[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                      16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  __m512i number = _mm512_load_si512(kFirst);
  uint16_t* to = columns;
  for (int64_t at = 0; at < words; ++at) {
    const uint64_t live = word[at];
    const int low = _mm_popcnt_u32(static_cast<uint32_t>(live));
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(static_cast<__mmask32>(live), number));
    number = _mm512_add_epi16(number, _mm512_set1_epi16(32));
    _mm512_storeu_si512(to + low, _mm512_maskz_compress_epi16(static_cast<__mmask32>(live >> 32), number));
    number = _mm512_add_epi16(number, _mm512_set1_epi16(32));
    to += _mm_popcnt_u64(live);
  }
  return to - columns;
}

GAPFX_FN inline const float* floats_of(const Layout& w, int64_t first, int64_t count, float* room) {
  if (w.type == kFloat) return static_cast<const float*>(w.values) + first;
  const uint16_t* from = static_cast<const uint16_t*>(w.values) + first;
  for (int64_t i = 0; i < count; i += 16) {
    const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm512_storeu_si512(room + i, _mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16));
  }
  return room;
}

GAPFX_FN inline float dot(const float* v, const uint16_t* column, int64_t count, const float* x) {
  float a = 0, b = 0, c = 0, d = 0;
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    a += v[i] * x[column[i]];
    b += v[i + 1] * x[column[i + 1]];
    c += v[i + 2] * x[column[i + 2]];
    d += v[i + 3] * x[column[i + 3]];
  }
  for (; i < count; ++i) a += v[i] * x[column[i]];
  return (a + b) + (c + d);
}

GAPFX_FN inline void dots_8(const float* v, const uint16_t* column, int64_t count, const float* lanes, float* out) {
  __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s)
      sum[s] = _mm256_fmadd_ps(_mm256_set1_ps(v[i + s]), _mm256_loadu_ps(lanes + 8 * column[i + s]), sum[s]);
  for (; i < count; ++i)
    sum[0] = _mm256_fmadd_ps(_mm256_set1_ps(v[i]), _mm256_loadu_ps(lanes + 8 * column[i]), sum[0]);
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3])));
}

GAPFX_FN inline void dots_16(const float* v, const uint16_t* column, int64_t count, const float* lanes, float* out) {
  __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s)
      sum[s] = _mm512_fmadd_ps(_mm512_set1_ps(v[i + s]), _mm512_loadu_ps(lanes + 16 * column[i + s]), sum[s]);
  for (; i < count; ++i)
    sum[0] = _mm512_fmadd_ps(_mm512_set1_ps(v[i]), _mm512_loadu_ps(lanes + 16 * column[i]), sum[0]);
  _mm512_storeu_ps(out, _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

// Live columns by number, of fp32 and bf16 values: one token in scalars, more of them in lanes.
GAPFX_FN void numbered(const Layout& w, const Tokens& x, float* y, int64_t begin, int64_t end) {
  Room<uint16_t> columns(w.columns ? 0 : w.inputs + kSpare);
  Room<float> values(w.type == kFloat ? 0 : w.inputs + kSpare);
  const int64_t words = words_of(w);
  float out[16];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = w.starts[row], count = w.starts[row + 1] - first;
    const uint16_t* column = w.columns ? w.columns + first : columns.data;
    if (!w.columns) columns_of(w.words + row * words, words, columns.data);
    const float* v = floats_of(w, first, count, values.data);
    if (x.count == 1) {
      y[row] = dot(v, column, count, x.plain);
      continue;
    }
    if (x.width == 8)
      dots_8(v, column, count, x.lanes, out);
    else
      dots_16(v, column, count, x.lanes, out);
    for (int m = 0; m < x.count; ++m) y[m * w.outputs + row] = out[m];
  }
}

#undef GAPFX_FN

}  // namespace avx512
