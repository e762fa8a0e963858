// Calls every exported kernel on odd sizes, for test_sanitizers.py. A family of kernels is one function below and one
// row of `families`. Buffers are exactly as long as what they hold, so that a step beyond them is seen.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../gapfx/kernels/linear.h"

extern "C" {
int gapfx_use_level(int level);
int64_t gapfx_count(const uint8_t* bits, int64_t numel);
int gapfx_expand(const void* values, const uint8_t* bits, void* dense, int64_t numel, int size, int threads);
int gapfx_gather(const void* dense, const uint8_t* bits, void* values, int64_t numel, int size, int threads);
int gapfx_linear_has_blocks(const uint8_t* bits, int64_t outputs, int64_t inputs);
void gapfx_linear_prepare(const uint8_t* bits, int64_t outputs, int64_t inputs, int64_t block, int64_t tile,
                          int64_t turned_tile, uint16_t* columns, int32_t* starts, int32_t* turned_starts);
void gapfx_linear_forward(const gapfx::linear::Pattern* pattern, const float* values, const float* bias, const void* x,
                          void* y, int64_t tokens, int is_fp32, int threads);
void gapfx_linear_backward(const gapfx::linear::Pattern* pattern, const int32_t* turned_starts, int64_t turned_tile,
                           const float* values, const void* gradient, const void* x, void* grad_x, float* grad_values,
                           int64_t tokens, int is_fp32, int threads);
}

namespace {

uint32_t state = 1;

uint32_t random_word() { return state = state * 1664525u + 1013904223u; }

bool chance(int percent) { return static_cast<int>((random_word() >> 8) % 100) < percent; }

// Packed bits of a mask of rows of `columns`, each row repeated `block` times.
std::vector<uint8_t> some_bits(int64_t rows, int64_t columns, int64_t block, int percent) {
  std::vector<uint8_t> bits((rows * columns + 7) / 8);
  for (int64_t row = 0; row < rows; row += block)
    for (int64_t column = 0; column < columns; ++column)
      if (chance(percent))
        for (int64_t i = 0; i < block; ++i) {
          const int64_t at = (row + i) * columns + column;
          bits[at / 8] |= static_cast<uint8_t>(1 << at % 8);
        }
  return bits;
}

// Elements of `size` bytes with small numbers in every format.
std::vector<uint8_t> some_data(int64_t numel, int size) {
  std::vector<uint8_t> data(numel * size);
  for (int64_t i = 0; i < numel; ++i) data[i * size + size - 1] = static_cast<uint8_t>(0x3e + i % 2);
  return data;
}

// A pointer that holds for an empty buffer too.
template <typename T>
T* start(std::vector<T>& data) {
  static T nothing[1];
  return data.empty() ? nothing : data.data();
}

void expand_and_gather() {
  for (int64_t numel : {1, 7, 8, 9, 31, 33, 63, 64, 65, 129, 1000, 70001})
    for (int percent : {0, 10, 50, 100})
      for (int size : {2, 4, 8})
        for (int threads : {1, 3}) {
          auto bits = some_bits(1, numel, 1, percent);
          auto values = some_data(gapfx_count(bits.data(), numel), size), dense = some_data(numel, size);
          gapfx_expand(start(values), bits.data(), dense.data(), numel, size, threads);
          gapfx_gather(dense.data(), bits.data(), start(values), numel, size, threads);
        }
}

void one_linear(int64_t outputs, int64_t inputs, int64_t wanted, int percent, int64_t tokens, int is_fp32, int threads) {
  auto bits = some_bits(outputs, inputs, wanted, percent);
  const int64_t block = gapfx_linear_has_blocks(bits.data(), outputs, inputs) ? 4 : 1;
  if (block < wanted) std::abort();
  const int64_t live = gapfx_count(bits.data(), outputs * inputs), tile = 48, tiles = (inputs + tile - 1) / tile;
  std::vector<uint16_t> columns(live / block + gapfx::linear::kSpare);
  const int64_t rows = outputs / block, turned_tile = 10, turned_tiles = (rows + turned_tile - 1) / turned_tile;
  std::vector<int32_t> starts((tiles + 1) * rows), turned_starts(turned_tiles * (inputs + 1));
  gapfx_linear_prepare(bits.data(), outputs, inputs, block, tile, turned_tile, columns.data(), starts.data(),
                       turned_starts.data());
  const gapfx::linear::Pattern pattern{rows, inputs, block, tiles, tile, rows, rows, columns.data(), starts.data()};
  const int size = is_fp32 ? 4 : 2;
  std::vector<float> values(live, 0.5f), bias(outputs, 1.0f), grad_values(live);
  auto x = some_data(tokens * inputs, size), y = some_data(tokens * outputs, size), grad_x = x;
  gapfx_linear_forward(&pattern, start(values), bias.data(), start(x), start(y), tokens, is_fp32, threads);
  gapfx_linear_forward(&pattern, start(values), nullptr, start(x), start(y), tokens, is_fp32, threads);
  gapfx_linear_backward(&pattern, turned_starts.data(), turned_tile, start(values), start(y), start(x), start(grad_x),
                        start(grad_values), tokens, is_fp32, threads);
}

void linear() {
  for (int64_t rows : {1, 5, 17, 65})
    for (int64_t inputs : {1, 15, 33, 130})
      for (int64_t block : {1, 4})
        for (int percent : {0, 3, 40, 100})
          for (int64_t tokens : {0, 1, 17, 47, 64, 130})
            for (int is_fp32 : {0, 1}) one_linear(rows * block, inputs, block, percent, tokens, is_fp32, 1 + rows % 3);
  for (int64_t block : {1, 4}) one_linear(516, 700, block, 10, 330, 1, 3);
}

struct Family {
  const char* name;
  void (*run)();
};

const Family families[] = {
    {"expand and gather", expand_and_gather},
    {"linear", linear},
};

}  // namespace

int main(int, char** arguments) {
  const int level = std::atoi(arguments[1]);
  if (gapfx_use_level(level) != level) {
    std::puts("this processor lacks the instructions");
    return 0;
  }
  for (const Family& family : families) {
    std::puts(family.name);
    family.run();
  }
  std::puts("done");
}
