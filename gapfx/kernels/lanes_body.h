// Registers of GAPFX_LANES fp32 lanes: loads and stores of fp32 and bf16, a square transposed, sums of registers.
// Included by each_level.h for every level.

constexpr int kLanes = GAPFX_LANES;

typedef float Vec __attribute__((vector_size(4 * GAPFX_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * GAPFX_LANES)));
typedef float LooseVec __attribute__((vector_size(4 * GAPFX_LANES), aligned(4), may_alias));
typedef uint16_t LooseHalves __attribute__((vector_size(2 * GAPFX_LANES), aligned(2), may_alias));

GAPFX_INLINE Vec load(const float* from) { return *reinterpret_cast<const LooseVec*>(from); }

GAPFX_INLINE void store(float* to, Vec v) { *reinterpret_cast<LooseVec*>(to) = v; }

// uint16_t stands for bf16 in all of these.
GAPFX_INLINE Vec load(const uint16_t* from) {
  return reinterpret_cast<Vec>(__builtin_convertvector(*reinterpret_cast<const LooseHalves*>(from), Words) << 16);
}

// To the nearest, ties to even; every NaN becomes the one that torch writes.
GAPFX_INLINE void store(uint16_t* to, Vec v) {
  const Words bits = reinterpret_cast<Words>(v), is_nan = reinterpret_cast<Words>(v != v);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *reinterpret_cast<LooseHalves*>(to) =
      __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), LooseHalves);
}

GAPFX_INLINE float widened(float v) { return v; }

GAPFX_INLINE float widened(uint16_t v) {
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

#if GAPFX_LANES == 16

GAPFX_INLINE void transpose(Vec (&v)[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      const __m512d even = _mm512_castps_pd(a[i + c]), odd = _mm512_castps_pd(a[i + c + 2]);
      b[i + 2 * c] = _mm512_castpd_ps(_mm512_unpacklo_pd(even, odd));
      b[i + 2 * c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd));
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 p = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), q = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 r = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd), s = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    v[c] = _mm512_shuffle_f32x4(p, q, 0x88);
    v[4 + c] = _mm512_shuffle_f32x4(r, s, 0x88);
    v[8 + c] = _mm512_shuffle_f32x4(p, q, 0xdd);
    v[12 + c] = _mm512_shuffle_f32x4(r, s, 0xdd);
  }
}

// Lane i is the sum of v[i].
GAPFX_INLINE Vec sums(const Vec (&v)[16]) {
  __m512 a[8], b[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d even = _mm512_castps_pd(a[2 * i]), odd = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
  }
  const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
  const __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

// As above, for four.
GAPFX_INLINE __m128 sums(const Vec (&v)[4]) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d even = _mm512_castps_pd(a), odd = _mm512_castps_pd(b);
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#elif GAPFX_LANES == 8

GAPFX_INLINE void transpose(Vec (&v)[8]) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      b[i + 2 * c] = _mm256_shuffle_ps(a[i + c], a[i + c + 2], 0x44);
      b[i + 2 * c + 1] = _mm256_shuffle_ps(a[i + c], a[i + c + 2], 0xee);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    v[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
    v[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
  }
}

// Lane i is the sum of v[i].
GAPFX_INLINE Vec sums(const Vec (&v)[8]) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

#else

GAPFX_INLINE void transpose(Vec (&v)[kLanes]) {
  float square[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) store(square[i], v[i]);
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) v[i][j] = square[j][i];
}

// Lane i is the sum of v[i].
GAPFX_INLINE Vec sums(const Vec (&v)[kLanes]) {
  float square[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) store(square[i], v[i]);
  Vec total = {};
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) total[i] += square[i][j];
  return total;
}

#endif
