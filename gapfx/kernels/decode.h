// A sparse weight [outputs, inputs] as the kernels for few tokens read it, and what they are given.

#pragma once

#include <cstdint>

namespace gapfx::decode {

enum Type { kFloat = 0, kHalf = 1, kByte = 2 };  // of values: fp32, bf16, int8

constexpr int kSpare = 64;   // values that stand behind the last one, to be read and not used
constexpr int kStreams = 4;  // rows far from each other that are read in turn, so that memory serves several at once
constexpr int kWord = 64;    // columns of a mask word
constexpr int kMaxTokens = 15;

// Live values row after row; those of row r are [starts[r], starts[r + 1]). Their columns are either `words`, one bit a
// column and a whole number of words a row, or `columns`; the other pointer is null. Filled by Python: keep both alike.
struct Layout {
  int64_t outputs, inputs;
  const uint64_t* words;
  const uint16_t* columns;
  const int64_t* starts;
  const void* values;
  const float* scales;    // of each row, int8 alone
  const int32_t* totals;  // sum of each row's values, int8 alone
  int32_t type;
};

// The tokens as a kernel reads them. All rows are `stride` long, a multiple of kWord, and zero behind the inputs.
struct Tokens {
  int count;
  int64_t stride;
  const float* plain;     // [count][stride]
  const float* lanes;     // [stride][width], for many tokens
  int width;
  const uint16_t* halves;  // [count * parts][stride], bf16: the nearest, then the rest (parts is 2 for fp32 tokens)
  int parts;
  const uint8_t* bytes;    // [count][stride], 128 + a number of -127 ... 127
  const float* steps;      // [count]: what one unit of `bytes` stands for
};

// y [count][outputs] in fp32, rows [begin, end).
using Rows = void (*)(const Layout&, const Tokens&, float* y, int64_t begin, int64_t end);

// Of the level in use: goes by the numbers of live columns, with one token plain and more in lanes, any type of values.
Rows numbered_rows();

// Lanes that so many tokens take.
inline int width_of(int count) { return count <= 4 ? 4 : count <= 8 ? 8 : 16; }

inline int64_t words_of(const Layout& w) { return (w.inputs + kWord - 1) / kWord; }

}  // namespace gapfx::decode
