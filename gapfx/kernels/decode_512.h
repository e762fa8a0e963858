// Kernels for few tokens in AVX-512: rows under a bit mask.

// Included by decode.cpp, in its namespace.

#pragma once

// gcc's order of instructions for processors in general makes rows of fp32, and them alone, take half as long again.
#define GAPFX_512_TUNED "tune=znver3," GAPFX_512
#define GAPFX_512 "avx2,fma,popcnt,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2"

namespace avx512 {

constexpr int kAhead = 1024;  // bytes that a stream is asked for before it is read

// Values are loaded as whole registers and expanded then: faster than a load that expands, and kSpare makes it safe.

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
    const __m512 w = _mm512_maskz_expand_ps(live[s], _mm512_loadu_ps(at[s]));
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
    const __mmask32 live = static_cast<__mmask32>(word >> (32 * s));
    const __m512bh w = (__m512bh)_mm512_maskz_expand_epi16(live, _mm512_loadu_si512(at[s]));
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
  const __m512i w = _mm512_maskz_expand_epi8(word, _mm512_loadu_si512(v));
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

}  // namespace avx512
