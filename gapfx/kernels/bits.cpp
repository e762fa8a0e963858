// Live weights between their two shapes: packed (one value for each 1 bit of a mask, in order) and expanded (dense,
// zeros elsewhere). Bit i of byte b is weight 8 b + i. Plain C ABI; values are words of 2, 4 or 8 bytes, never computed
// with, so that every value arrives with its very bits (NaN and -0.0 too).

#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu.h"

#if GAPFX_X86
#include <immintrin.h>
#define GAPFX_POPCNT __attribute__((target("popcnt,bmi")))
#define GAPFX_AVX512 __attribute__((target("popcnt,bmi,avx512f,avx512bw,avx512vl,avx512vbmi2")))
#endif

namespace {

constexpr int64_t kWord = 64;               // weights that one step of the scan takes
constexpr int64_t kParallelFrom = 1 << 16;  // weights from which threads pay
constexpr int kMaxThreads = 256;

// Mask word of weights [at, at + 64), zero beyond the end.
inline uint64_t load_word(const uint8_t* bits, int64_t at, int64_t numel) {
  const int64_t left = numel - at;
  uint64_t word = 0;
  std::memcpy(&word, bits + at / 8, left >= kWord ? 8 : (left + 7) / 8);
  return left >= kWord ? word : word & ((uint64_t{1} << left) - 1);
}

inline int64_t count_scan(const uint8_t* bits, int64_t begin, int64_t end) {
  int64_t total = 0;
  for (int64_t at = begin; at < end; at += kWord) total += __builtin_popcountll(load_word(bits, at, end));
  return total;
}

template <typename T>
inline void expand_scan(const T* values, const uint8_t* bits, T* dense, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kWord) {
    uint64_t word = load_word(bits, at, end);
    std::memset(static_cast<void*>(dense + at), 0, sizeof(T) * (end - at < kWord ? end - at : kWord));
    for (; word; word &= word - 1) dense[at + __builtin_ctzll(word)] = *values++;
  }
}

template <typename T>
inline void gather_scan(const T* dense, const uint8_t* bits, T* values, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kWord)
    for (uint64_t word = load_word(bits, at, end); word; word &= word - 1) *values++ = dense[at + __builtin_ctzll(word)];
}

#if GAPFX_X86

GAPFX_POPCNT int64_t count_popcnt(const uint8_t* bits, int64_t begin, int64_t end) {
  int64_t total = 0;
  for (int64_t at = begin; at < end; at += kWord) total += __builtin_popcountll(load_word(bits, at, end));
  return total;
}

GAPFX_AVX512 void expand_512(const uint32_t* values, const uint8_t* bits, uint32_t* dense, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kWord) {
    uint64_t word = load_word(bits, at, end);
    for (int64_t lane = at; lane < at + kWord && lane < end; lane += 16, word >>= 16) {
      const __mmask16 live = static_cast<__mmask16>(word);
      const __mmask16 inside = end - lane >= 16 ? 0xffff : static_cast<__mmask16>((1u << (end - lane)) - 1);
      _mm512_mask_storeu_epi32(dense + lane, inside, _mm512_maskz_expandloadu_epi32(live, values));
      values += _mm_popcnt_u32(live);
    }
  }
}

GAPFX_AVX512 void expand_512(const uint16_t* values, const uint8_t* bits, uint16_t* dense, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kWord) {
    uint64_t word = load_word(bits, at, end);
    for (int64_t lane = at; lane < at + kWord && lane < end; lane += 32, word >>= 32) {
      const __mmask32 live = static_cast<__mmask32>(word);
      const __mmask32 inside = end - lane >= 32 ? 0xffffffffu : (__mmask32{1} << (end - lane)) - 1;
      _mm512_mask_storeu_epi16(dense + lane, inside, _mm512_maskz_expandloadu_epi16(live, values));
      values += _mm_popcnt_u32(live);
    }
  }
}

// Compressed in a register first: a compressing store to memory is about 50 times slower.
GAPFX_AVX512 void gather_512(const uint32_t* dense, const uint8_t* bits, uint32_t* values, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kWord) {
    uint64_t word = load_word(bits, at, end);
    for (int64_t lane = at; word; lane += 16, word >>= 16) {
      const __mmask16 live = static_cast<__mmask16>(word);
      const int count = _mm_popcnt_u32(live);
      const __m512i packed = _mm512_maskz_compress_epi32(live, _mm512_maskz_loadu_epi32(live, dense + lane));
      _mm512_mask_storeu_epi32(values, static_cast<__mmask16>((1u << count) - 1), packed);
      values += count;
    }
  }
}

GAPFX_AVX512 void gather_512(const uint16_t* dense, const uint8_t* bits, uint16_t* values, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kWord) {
    uint64_t word = load_word(bits, at, end);
    for (int64_t lane = at; word; lane += 32, word >>= 32) {
      const __mmask32 live = static_cast<__mmask32>(word);
      const int count = _mm_popcnt_u32(live);
      const __m512i packed = _mm512_maskz_compress_epi16(live, _mm512_maskz_loadu_epi16(live, dense + lane));
      _mm512_mask_storeu_epi16(values, static_cast<__mmask32>((uint64_t{1} << count) - 1), packed);
      values += count;
    }
  }
}

#endif

int64_t count(const uint8_t* bits, int64_t begin, int64_t end) {
#if GAPFX_X86
  if (gapfx::level() >= gapfx::kAvx2) return count_popcnt(bits, begin, end);
#endif
  return count_scan(bits, begin, end);
}

void expand_part(const uint64_t* values, const uint8_t* bits, uint64_t* dense, int64_t begin, int64_t end) {
  expand_scan(values, bits, dense, begin, end);
}

void gather_part(const uint64_t* dense, const uint8_t* bits, uint64_t* values, int64_t begin, int64_t end) {
  gather_scan(dense, bits, values, begin, end);
}

template <typename T>
void expand_part(const T* values, const uint8_t* bits, T* dense, int64_t begin, int64_t end) {
#if GAPFX_X86
  if (gapfx::level() == gapfx::kAvx512) return expand_512(values, bits, dense, begin, end);
#endif
  expand_scan(values, bits, dense, begin, end);
}

template <typename T>
void gather_part(const T* dense, const uint8_t* bits, T* values, int64_t begin, int64_t end) {
#if GAPFX_X86
  if (gapfx::level() == gapfx::kAvx512) return gather_512(dense, bits, values, begin, end);
#endif
  gather_scan(dense, bits, values, begin, end);
}

// Calls part(begin, end, number of 1 bits before begin) for consecutive parts of [0, numel), in parallel.
template <typename Part>
void in_parts(const uint8_t* bits, int64_t numel, int threads, Part part) {
#ifdef _OPENMP
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads > 1 && numel >= kParallelFrom) {
    int64_t before[kMaxThreads + 1] = {0};
#pragma omp parallel num_threads(threads)
    {
      const int team = omp_get_num_threads(), me = omp_get_thread_num();
      const int64_t words = (numel + kWord - 1) / kWord;
      const int64_t begin = words * me / team * kWord;
      const int64_t stop = words * (me + 1) / team * kWord;
      const int64_t end = stop < numel ? stop : numel;
      before[me + 1] = count(bits, begin, end);
#pragma omp barrier
#pragma omp single
      for (int i = 0; i < team; ++i) before[i + 1] += before[i];
      part(begin, end, before[me]);
    }
    return;
  }
#else
  (void)bits;
  (void)threads;
#endif
  part(int64_t{0}, numel, int64_t{0});
}

template <typename T>
void expand(const void* values, const uint8_t* bits, void* dense, int64_t numel, int threads) {
  in_parts(bits, numel, threads, [=](int64_t begin, int64_t end, int64_t before) {
    expand_part(static_cast<const T*>(values) + before, bits, static_cast<T*>(dense), begin, end);
  });
}

template <typename T>
void gather(const void* dense, const uint8_t* bits, void* values, int64_t numel, int threads) {
  in_parts(bits, numel, threads, [=](int64_t begin, int64_t end, int64_t before) {
    gather_part(static_cast<const T*>(dense), bits, static_cast<T*>(values) + before, begin, end);
  });
}

}  // namespace

GAPFX_API int64_t gapfx_count(const uint8_t* bits, int64_t numel) { return count(bits, 0, numel); }

// dense[i] = the next value where bit i is 1, else 0. `size` is the bytes of a value. Returns 0, or 1 for another size.
GAPFX_API int gapfx_expand(const void* values, const uint8_t* bits, void* dense, int64_t numel, int size, int threads) {
  switch (size) {
    case 2: expand<uint16_t>(values, bits, dense, numel, threads); return 0;
    case 4: expand<uint32_t>(values, bits, dense, numel, threads); return 0;
    case 8: expand<uint64_t>(values, bits, dense, numel, threads); return 0;
  }
  return 1;
}

// The values where the bits are 1, in order. Returns 0, or 1 for another size.
GAPFX_API int gapfx_gather(const void* dense, const uint8_t* bits, void* values, int64_t numel, int size, int threads) {
  switch (size) {
    case 2: gather<uint16_t>(dense, bits, values, numel, threads); return 0;
    case 4: gather<uint32_t>(dense, bits, values, numel, threads); return 0;
    case 8: gather<uint64_t>(dense, bits, values, numel, threads); return 0;
  }
  return 1;
}
