// An exact threshold: how many keys fall on each value of sixteen of their bits, and which keys are above the one found.
//
// A key is an unsigned number of 32 bits in the order of the scores: fp32, bf16 (widened) or int32. -0.0 has the key of
// 0.0. Keys are made while the scores stream by and are never stored.

#include <cstdint>
#include <cstring>
#include <memory>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu.h"

namespace {

constexpr int64_t kBlock = 64;              // scores whose keys are made at once, in vectors
constexpr int64_t kDigits = 1 << 16;        // values of sixteen bits
constexpr int64_t kParallelFrom = 1 << 17;  // scores from which threads pay
constexpr int64_t kCopiesFrom = 1 << 18;    // scores from which several copies pay
constexpr int kCopies = 4;                  // of the counts: neighbours often fall on one value, and stores would wait
constexpr int kMaxThreads = 256;

enum Kind { kFloat32 = 0, kBfloat16 = 1, kInt32 = 2 };

#define GAPFX_INLINE inline __attribute__((always_inline))

// Among negative numbers the larger magnitude is the smaller number: all of their bits are flipped.
GAPFX_INLINE uint32_t key_of_float(uint32_t word) {
  const uint32_t key = word ^ (static_cast<uint32_t>(static_cast<int32_t>(word) >> 31) | 0x80000000u);
  return key + (key == 0x7fffffffu);
}

struct Float32 {
  using Word = uint32_t;
  static GAPFX_INLINE uint32_t key(Word word) { return key_of_float(word); }
  static GAPFX_INLINE bool is_nan(Word word) { return (word & 0x7fffffffu) > 0x7f800000u; }
};

struct Bfloat16 {
  using Word = uint16_t;
  static GAPFX_INLINE uint32_t key(Word word) { return key_of_float(static_cast<uint32_t>(word) << 16); }
  static GAPFX_INLINE bool is_nan(Word word) { return (word & 0x7fffu) > 0x7f80u; }
};

struct Int32 {
  using Word = uint32_t;
  static GAPFX_INLINE uint32_t key(Word word) { return word ^ 0x80000000u; }
  static GAPFX_INLINE bool is_nan(Word) { return false; }
};

// Adds to counts[copy][digit]: the high half of each key, or the low half of those whose high half is `high`.
template <typename Score>
GAPFX_INLINE void count_body(const typename Score::Word* words, int64_t numel, int64_t high, uint32_t* counts,
                             int64_t stride) {
  uint32_t keys[kBlock];
  const uint32_t wanted = static_cast<uint32_t>(high);
  for (int64_t at = 0; at < numel; at += kBlock) {
    const int64_t size = numel - at < kBlock ? numel - at : kBlock;
    uint32_t hits = 0;
    for (int64_t i = 0; i < size; ++i) {
      keys[i] = Score::key(words[at + i]);
      hits += keys[i] >> 16 == wanted;
    }
    if (high < 0)
      for (int64_t i = 0; i < size; ++i) ++counts[i % kCopies * stride + (keys[i] >> 16)];
    else if (hits)
      for (int64_t i = 0; i < size; ++i)
        if (keys[i] >> 16 == wanted) ++counts[i % kCopies * stride + (keys[i] & 0xffff)];
  }
}

template <typename Score>
GAPFX_INLINE int64_t equal_body(const typename Score::Word* words, int64_t numel, uint32_t key) {
  int64_t found = 0;
  for (int64_t at = 0; at < numel; at += kBlock) {
    const int64_t size = numel - at < kBlock ? numel - at : kBlock;
    uint32_t hits = 0;
    for (int64_t i = 0; i < size; ++i) hits += Score::key(words[at + i]) == key;
    found += hits;
  }
  return found;
}

// mask = key above, or equal and among the first `ties` that are.
template <typename Score>
GAPFX_INLINE void mark_body(const typename Score::Word* words, int64_t numel, uint32_t key, int64_t ties,
                            uint8_t* mask) {
  for (int64_t at = 0; at < numel; at += kBlock) {
    const int64_t size = numel - at < kBlock ? numel - at : kBlock;
    uint32_t hits = 0;
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t mine = Score::key(words[at + i]);
      mask[at + i] = mine > key;
      hits += mine == key;
    }
    for (int64_t i = 0; hits && ties > 0 && i < size; ++i)
      if (Score::key(words[at + i]) == key) mask[at + i] = ties-- > 0;
  }
}

template <typename Score>
GAPFX_INLINE int64_t nan_body(const typename Score::Word* words, int64_t numel) {
  int64_t found = 0;
  for (int64_t at = 0; at < numel; at += kBlock) {
    const int64_t size = numel - at < kBlock ? numel - at : kBlock;
    uint32_t hits = 0;
    for (int64_t i = 0; i < size; ++i) hits += Score::is_nan(words[at + i]);
    found += hits;
  }
  return found;
}

// The four bodies, compiled for a level.
#define GAPFX_LEVEL(NAME, TARGET)                                                                            \
  template <typename Score>                                                                                  \
  struct NAME {                                                                                              \
    using Word = typename Score::Word;                                                                       \
    TARGET static void count(const Word* words, int64_t numel, int64_t high, uint32_t* counts, int64_t by) { \
      count_body<Score>(words, numel, high, counts, by);                                                     \
    }                                                                                                        \
    TARGET static int64_t equal(const Word* words, int64_t numel, uint32_t key) {                            \
      return equal_body<Score>(words, numel, key);                                                           \
    }                                                                                                        \
    TARGET static void mark(const Word* words, int64_t numel, uint32_t key, int64_t ties, uint8_t* mask) {   \
      mark_body<Score>(words, numel, key, ties, mask);                                                       \
    }                                                                                                        \
    TARGET static int64_t nans(const Word* words, int64_t numel) { return nan_body<Score>(words, numel); }   \
  };

GAPFX_LEVEL(Portable, )
#if GAPFX_X86
GAPFX_LEVEL(Avx2, __attribute__((target("avx2"))))
GAPFX_LEVEL(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))))
#endif

// part(begin, end, index) for consecutive parts of [0, numel), in parallel; returns how many there were.
template <typename Part>
int in_parts(int64_t numel, int threads, Part part) {
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads < 1 || numel < kParallelFrom) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int index = 0; index < threads; ++index) {
    const int64_t blocks = (numel + kBlock - 1) / kBlock;
    const int64_t stop = blocks * (index + 1) / threads * kBlock;
    part(blocks * index / threads * kBlock, stop < numel ? stop : numel, index);
  }
  return threads;
}

template <typename Level>
struct Run {
  using Word = typename Level::Word;

  static void counts(const void* data, int64_t numel, int64_t high, int64_t* total, int threads) {
    std::memset(total, 0, sizeof(int64_t) * kDigits);
    in_parts(numel, threads, [=](int64_t begin, int64_t end, int) {
      const int64_t copies = numel < kCopiesFrom ? 1 : kCopies;
      const std::unique_ptr<uint32_t[]> mine(new uint32_t[copies * kDigits]());
      // A part at a time that no count of 32 bits can overflow.
      for (int64_t at = begin; at < end; at += int64_t{1} << 31) {
        const int64_t size = end - at < (int64_t{1} << 31) ? end - at : int64_t{1} << 31;
        Level::count(static_cast<const Word*>(data) + at, size, high, mine.get(), copies > 1 ? kDigits : 0);
#pragma omp critical(gapfx_histogram)
        for (int64_t copy = 0; copy < copies; ++copy)
          for (int64_t digit = 0; digit < kDigits; ++digit) total[digit] += mine[copy * kDigits + digit];
        std::memset(mine.get(), 0, sizeof(uint32_t) * copies * kDigits);
      }
    });
  }

  static void mark(const void* data, int64_t numel, uint32_t key, int64_t ties, uint8_t* mask, int threads) {
    const Word* words = static_cast<const Word*>(data);
    int64_t before[kMaxThreads + 1] = {0};
    int64_t* after = before + 1;
    if (threads > 1)
      in_parts(numel, threads, [=](int64_t begin, int64_t end, int index) {
        after[index] = Level::equal(words + begin, end - begin, key);
      });
    for (int index = 0; index < kMaxThreads; ++index) after[index] += before[index];
    const int64_t* first = before;
    in_parts(numel, threads, [=](int64_t begin, int64_t end, int index) {
      Level::mark(words + begin, end - begin, key, ties - first[index], mask + begin);
    });
  }

  static int64_t nans(const void* data, int64_t numel, int threads) {
    int64_t found[kMaxThreads] = {0}, total = 0;
    int64_t* each = found;
    const int parts = in_parts(numel, threads, [=](int64_t begin, int64_t end, int index) {
      each[index] = Level::nans(static_cast<const Word*>(data) + begin, end - begin);
    });
    for (int index = 0; index < parts; ++index) total += found[index];
    return total;
  }
};

// use(Run<...>) of the level in use, for the kind of score.
template <template <typename> class Level, typename Use>
auto with_kind(int kind, Use use) {
  if (kind == kFloat32) return use(Run<Level<Float32>>());
  if (kind == kBfloat16) return use(Run<Level<Bfloat16>>());
  return use(Run<Level<Int32>>());
}

template <typename Use>
auto with_level(int kind, Use use) {
#if GAPFX_X86
  if (gapfx::level() == gapfx::kAvx512) return with_kind<Avx512>(kind, use);
  if (gapfx::level() == gapfx::kAvx2) return with_kind<Avx2>(kind, use);
#endif
  return with_kind<Portable>(kind, use);
}

}  // namespace

// counts[65536]: how many keys have each high half, or, if `high` >= 0, each low half among those with that high half.
GAPFX_API void gapfx_histogram(const void* scores, int64_t numel, int kind, int64_t high, int64_t* counts,
                               int threads) {
  with_level(kind, [=](auto run) { run.counts(scores, numel, high, counts, threads); });
}

// mask[i] = 1 where the key is above `key`, and at the first `ties` places where it equals `key`; else 0.
GAPFX_API void gapfx_mark(const void* scores, int64_t numel, int kind, uint32_t key, int64_t ties, uint8_t* mask,
                          int threads) {
  with_level(kind, [=](auto run) { run.mark(scores, numel, key, ties, mask, threads); });
}

GAPFX_API int64_t gapfx_num_nan(const void* scores, int64_t numel, int kind, int threads) {
  return with_level(kind, [=](auto run) { return run.nans(scores, numel, threads); });
}
