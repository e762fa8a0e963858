// Live values by the numbers of their columns, for few tokens: one token in scalars, more of them in lanes.
// Included by each_level.h for every level.

using gapfx::decode::kByte;
using gapfx::decode::kFloat;
using gapfx::decode::kHalf;
using gapfx::decode::kSpare;
using gapfx::decode::kWord;
using gapfx::decode::Layout;
using gapfx::decode::Tokens;

// Products of 127 with 127 that fp32 adds up exactly: int8 is summed in pieces of so many values.
constexpr int64_t kExact = 1024;

// A row that was made ready: its columns, and its values in fp32.
struct Row {
  const uint16_t* columns;
  const float* values;
  int64_t count;
};

// Room for one row.
struct Scratch {
  uint16_t* columns;
  float* values;
};

GAPFX_FN void columns_of(const Layout& w, int64_t row, uint16_t* columns) {
  const int64_t words = gapfx::decode::words_of(w);
  for (int64_t at = 0; at < words; ++at)
    for (uint64_t live = w.words[row * words + at]; live; live &= live - 1)
      *columns++ = static_cast<uint16_t>(at * kWord + __builtin_ctzll(live));
}

// The last register reads and writes what is spare.
GAPFX_INLINE const float* floats_of(const Layout& w, int64_t first, int64_t count, float* room) {
  if (w.type == kFloat) return static_cast<const float*>(w.values) + first;
  if (w.type == kHalf)
    for (int64_t i = 0; i < count; i += kLanes) store(room + i, load(static_cast<const uint16_t*>(w.values) + first + i));
  else
    for (int64_t i = 0; i < count; ++i) room[i] = static_cast<const int8_t*>(w.values)[first + i];
  return room;
}

GAPFX_INLINE Row row_of(const Layout& w, int64_t row, const Scratch& scratch) {
  const int64_t first = w.starts[row], count = w.starts[row + 1] - first;
  if (!w.columns) columns_of(w, row, scratch.columns);
  return {w.columns ? w.columns + first : scratch.columns, floats_of(w, first, count, scratch.values), count};
}

GAPFX_INLINE float dot(const Row& row, int64_t begin, int64_t end, const float* x) {
  float sum[4] = {0, 0, 0, 0};
  int64_t i = begin;
  for (; i + 4 <= end; i += 4)
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) sum[s] += row.values[i + s] * x[row.columns[i + s]];
  for (; i < end; ++i) sum[0] += row.values[i] * x[row.columns[i]];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// All tokens at once: WIDTH lanes in as few registers as hold them, in several sums that do not wait for each other.
template <int WIDTH>
GAPFX_INLINE void dots(const Row& row, int64_t begin, int64_t end, const float* lanes, float* out) {
  constexpr int kPart = WIDTH < kLanes ? WIDTH : kLanes, kParts = WIDTH / kPart, kSums = kParts < 4 ? 4 / kParts : 1;
  typedef float Part __attribute__((vector_size(4 * kPart)));
  typedef float LoosePart __attribute__((vector_size(4 * kPart), aligned(4), may_alias));
  Part sum[kSums][kParts] = {};
  const auto add = [&](Part (&to)[kParts], int64_t i) __attribute__((always_inline)) {
    const float* tokens = lanes + WIDTH * row.columns[i];
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) to[p] += row.values[i] * *reinterpret_cast<const LoosePart*>(tokens + p * kPart);
  };
  int64_t i = begin;
  for (; i + kSums <= end; i += kSums)
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) add(sum[s], i + s);
  for (; i < end; ++i) add(sum[0], i);
#pragma GCC unroll 4
  for (int p = 0; p < kParts; ++p) {
#pragma GCC unroll 4
    for (int s = 1; s < kSums; ++s) sum[0][p] += sum[s][p];
    *reinterpret_cast<LoosePart*>(out + p * kPart) = sum[0][p];
  }
}

GAPFX_INLINE void sums_of(const Row& row, int64_t begin, int64_t end, const Tokens& x, float* out) {
  if (x.count == 1)
    out[0] = dot(row, begin, end, x.plain);
  else if (x.width == 4)
    dots<4>(row, begin, end, x.lanes, out);
  else if (x.width == 8)
    dots<8>(row, begin, end, x.lanes, out);
  else
    dots<16>(row, begin, end, x.lanes, out);
}

GAPFX_FN void exact_sums(const Row& row, const Tokens& x, float scale, float* out) {
  int32_t whole[gapfx::decode::kMaxTokens] = {};
  for (int64_t begin = 0; begin < row.count; begin += kExact) {
    sums_of(row, begin, begin + kExact < row.count ? begin + kExact : row.count, x, out);
    for (int m = 0; m < x.count; ++m) whole[m] += static_cast<int32_t>(out[m]);
  }
  for (int m = 0; m < x.count; ++m) out[m] = static_cast<float>(whole[m]) * scale;
}

GAPFX_FN void numbered(const Layout& w, const Tokens& x, float* y, int64_t begin, int64_t end) {
  const int64_t room = w.inputs + kSpare;
  auto* columns = w.columns ? nullptr : static_cast<uint16_t*>(std::malloc(sizeof(uint16_t) * room));
  auto* values = w.type == kFloat ? nullptr : static_cast<float*>(std::malloc(sizeof(float) * room));
  float out[16];
  for (int64_t r = begin; r < end; ++r) {
    const Row row = row_of(w, r, {columns, values});
    if (w.type == kByte)
      exact_sums(row, x, w.scales[r], out);
    else
      sums_of(row, 0, row.count, x, out);
    for (int m = 0; m < x.count; ++m) y[m * w.outputs + r] = out[m];
  }
  std::free(columns);
  std::free(values);
}
