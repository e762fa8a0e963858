// Masks between one byte and one bit a weight. Bit i of byte b is weight 8 b + i; a byte is 0 or not. Plain C ABI.

#include <cstdint>
#include <cstring>

#include "cpu.h"

#if GAPFX_X86
#include <immintrin.h>
#define GAPFX_AVX512 __attribute__((target("avx512f,avx512bw")))
#endif

namespace {

constexpr int64_t kWord = 64;               // weights of a step
constexpr int64_t kParallelFrom = 1 << 20;  // weights from which threads pay
constexpr uint64_t kOnes = 0x0101010101010101, kLow = 0x7f7f7f7f7f7f7f7f;

// Each byte 1 where it is not 0.
inline uint64_t ones_of(uint64_t bytes) { return (((bytes & kLow) + kLow) | bytes) >> 7 & kOnes; }

inline uint8_t packed(uint64_t bytes) { return static_cast<uint8_t>(ones_of(bytes) * 0x0102040810204080 >> 56); }

inline uint64_t unpacked(uint8_t bits) { return ones_of(bits * kOnes & 0x8040201008040201); }

void pack_scan(const uint8_t* mask, uint8_t* bits, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += 8) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, mask + at, end - at < 8 ? end - at : 8);
    bits[at / 8] = packed(bytes);
  }
}

void unpack_scan(const uint8_t* bits, uint8_t* mask, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += 8) {
    const uint64_t bytes = unpacked(bits[at / 8]);
    std::memcpy(mask + at, &bytes, end - at < 8 ? end - at : 8);
  }
}

#if GAPFX_X86

GAPFX_AVX512 void pack_512(const uint8_t* mask, uint8_t* bits, int64_t begin, int64_t end) {
  int64_t at = begin;
  for (; at + kWord <= end; at += kWord) {
    const __m512i bytes = _mm512_loadu_si512(mask + at);
    const uint64_t word = _mm512_test_epi8_mask(bytes, bytes);
    std::memcpy(bits + at / 8, &word, 8);
  }
  pack_scan(mask, bits, at, end);
}

GAPFX_AVX512 void unpack_512(const uint8_t* bits, uint8_t* mask, int64_t begin, int64_t end) {
  int64_t at = begin;
  for (; at + kWord <= end; at += kWord) {
    uint64_t word;
    std::memcpy(&word, bits + at / 8, 8);
    _mm512_storeu_si512(mask + at, _mm512_maskz_set1_epi8(word, 1));
  }
  unpack_scan(bits, mask, at, end);
}

#endif

// Calls part(begin, end) for consecutive parts of whole words of [0, numel), in parallel.
template <typename Part>
void in_parts(int64_t numel, int threads, Part part) {
  const int64_t teams = numel < kParallelFrom || threads < 1 ? 1 : threads;
  const int64_t each = (numel / kWord + teams) / teams * kWord;
#pragma omp parallel for num_threads(static_cast<int>(teams)) if (teams > 1)
  for (int64_t team = 0; team < teams; ++team) {
    const int64_t begin = team * each < numel ? team * each : numel;
    part(begin, begin + each < numel ? begin + each : numel);
  }
}

}  // namespace

// ceil(numel / 8) bytes of bits from numel bytes; spare bits are 0.
GAPFX_API void gapfx_pack(const uint8_t* mask, uint8_t* bits, int64_t numel, int threads) {
  in_parts(numel, threads, [=](int64_t begin, int64_t end) {
#if GAPFX_X86
    if (gapfx::level() == gapfx::kAvx512) return pack_512(mask, bits, begin, end);
#endif
    pack_scan(mask, bits, begin, end);
  });
}

// numel bytes, each 0 or 1, from their bits.
GAPFX_API void gapfx_unpack(const uint8_t* bits, uint8_t* mask, int64_t numel, int threads) {
  in_parts(numel, threads, [=](int64_t begin, int64_t end) {
#if GAPFX_X86
    if (gapfx::level() == gapfx::kAvx512) return unpack_512(bits, mask, begin, end);
#endif
    unpack_scan(bits, mask, begin, end);
  });
}
