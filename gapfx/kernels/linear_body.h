// Kernels of a linear layer with a sparse weight, for one level of instructions. The tokens of a panel are the lanes: a
// live weight is one broadcast and as many products as a panel has registers, whatever the columns are.

using gapfx::linear::kBlock;
using gapfx::linear::Panel;
using gapfx::linear::Pattern;
using gapfx::linear::Strips;

// Registers that one pass over a row may sum in; a panel that has more is passed several times.
constexpr int kMost = kLanes == 16 ? 4 : 8;

constexpr int num_passes(int width, int most) { return (width / kLanes + most - 1) / most; }

template <typename T>
GAPFX_FN void pack(const void* source, int64_t stride, int tokens, int64_t features, Panel panel) {
  const T* x = static_cast<const T*>(source);
  for (int64_t k = 0; k < features; k += kLanes)
    for (int lane = 0; lane < panel.width; lane += kLanes) {
      const int num = features - k < kLanes ? static_cast<int>(features - k) : kLanes;
      Vec v[kLanes];
      if (num == kLanes && lane + kLanes <= tokens) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = load(x + (lane + i) * stride + k);
      } else {
        float part[kLanes][kLanes] = {};
        for (int i = 0; i < kLanes && lane + i < tokens; ++i)
          for (int j = 0; j < num; ++j) part[i][j] = widened(x[(lane + i) * stride + k + j]);
        for (int i = 0; i < kLanes; ++i) v[i] = load(part[i]);
      }
      transpose(v);
      float* to = panel.data + k * panel.width + lane;
      if (num == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + i * panel.width, v[i]);
      } else {
        for (int i = 0; i < num; ++i) store(to + i * panel.width, v[i]);
      }
    }
}

template <typename T>
GAPFX_FN void unpack(Panel panel, int64_t features, void* target, int64_t stride, int tokens) {
  T* y = static_cast<T*>(target);
  for (int lane = 0; lane < panel.width && lane < tokens; lane += kLanes)
    for (int64_t n = 0; n < features; n += kLanes) {
      const int num = features - n < kLanes ? static_cast<int>(features - n) : kLanes;
      const float* from = panel.data + n * panel.width + lane;
      Vec v[kLanes];
      for (int i = num; i < kLanes; ++i) v[i] = Vec{};
      for (int i = 0; i < num; ++i) v[i] = load(from + i * panel.width);
      transpose(v);
      if (num == kLanes && lane + kLanes <= tokens) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(y + (lane + i) * stride + n, v[i]);
        continue;
      }
      T part[kLanes][kLanes];
      for (int i = 0; i < kLanes; ++i) store(part[i], v[i]);
      for (int i = 0; i < kLanes && lane + i < tokens; ++i)
        std::memcpy(y + (lane + i) * stride + n, part[i], num * sizeof(T));
    }
}

// Entries of a row in a tile lie far from those of the next row, where no hardware looks ahead: read `kAhead` rows early,
// this made products 1.5 times faster.
constexpr int kAhead = 4;

// The cache lines of what a row has in one tile, nearly always.
template <typename T>
GAPFX_INLINE void fetch(const T* to) {
  const char* line = reinterpret_cast<const char*>(to);
  for (int i = 0; i < (sizeof(T) == 2 ? 2 : 3); ++i) __builtin_prefetch(line + 64 * i);
}

// Memory that is read soon: the second cache gets it in even steps.
struct Stream {
  const char *at, *end;
  int64_t lines;  // of the cache, a step
};

template <typename T>
GAPFX_INLINE Stream stream(const T* from, const T* to, int64_t steps) {
  const int64_t bytes = (to - from) * sizeof(T);
  return {reinterpret_cast<const char*>(from), reinterpret_cast<const char*>(to), (bytes + 64 * steps - 1) / (64 * steps)};
}

GAPFX_INLINE void step(Stream& s) {
  for (int64_t i = 0; i < s.lines && s.at < s.end; ++i, s.at += 64) __builtin_prefetch(s.at, 0, 2);
}

// What the next rows of a weight read, as many as are multiplied now.
struct Ahead {
  Stream columns, values;
};

// Nothing where entries are tile by tile, and so lie together anyway, and where single rows have fewer than an eighth of
// their weights: there it took what it gave. Else it made cold products 5 to 12 % faster.
GAPFX_INLINE Ahead ahead_of(const Pattern& p, const float* values, int64_t begin, int64_t end, int64_t steps) {
  const int64_t after = p.next == p.tile_step ? std::min(p.rows, 2 * end - begin) : end;
  if (after <= end) return {};
  const int64_t first = p.starts[end], last = p.starts[p.tiles * p.tile_step + after - 1];
  if (p.block == 1 && (last - first) * 8 < (after - end) * p.inputs) return {};
  return {stream(p.columns + first, p.columns + last, steps),
          stream(values + first * p.block, values + last * p.block, steps)};
}

// The lanes of a column of a panel.
template <int Width>
GAPFX_INLINE const float* lanes_of(const float* panel, uint32_t column) {
  return panel + column * uint32_t{Width};
}

template <int Registers>
GAPFX_INLINE void load_lanes(Vec (&lanes)[Registers], const float* from) {
#pragma GCC unroll 4
  for (int r = 0; r < Registers; ++r) lanes[r] = load(from + r * kLanes);
}

template <int Registers>
GAPFX_INLINE void add_scaled(Vec (&sum)[Registers], float value, const float* x) {
#pragma GCC unroll 8
  for (int i = 0; i < Registers; ++i) sum[i] += load(x + i * kLanes) * value;
}

template <int Registers>
GAPFX_INLINE void begin_sums(Vec (&sum)[Registers], int64_t tile, const float* bias, const float* y) {
#pragma GCC unroll 8
  for (int i = 0; i < Registers; ++i) sum[i] = tile ? load(y + i * kLanes) : (bias ? Vec{} + *bias : Vec{});
}

template <int Registers>
GAPFX_INLINE void end_sums(const Vec (&sum)[Registers], float* y) {
#pragma GCC unroll 8
  for (int i = 0; i < Registers; ++i) store(y + i * kLanes, sum[i]);
}

// One output a row; `Inputs` inputs that follow each other in an entry.
template <int Width, int Inputs>
GAPFX_FN void product_of(const Pattern& p, const float* values, const float* bias, const float* panel, int64_t begin,
                         int64_t end, float* y) {
  constexpr int kPasses = num_passes(Width, kMost), kRegisters = Width / kLanes / kPasses;
  Ahead ahead = ahead_of(p, values, begin, end, kPasses * p.tiles * (end - begin));
  for (int pass = 0; pass < kPasses; ++pass)
    for (int64_t tile = 0; tile < p.tiles; ++tile) {
      const int32_t *from = p.starts + tile * p.tile_step, *to = from + p.next;
      const float* x = panel + pass * kRegisters * kLanes;
      for (int64_t row = begin; row < end; ++row) {
        float* out = y + (row - begin) * Width + pass * kRegisters * kLanes;
        Vec sum[kRegisters];
        begin_sums(sum, tile, bias ? bias + row : nullptr, out);
        int64_t at = from[row];
        const int64_t stop = to[row];
        step(ahead.columns);
        step(ahead.values);
        if (row + kAhead < end) {
          fetch(p.columns + from[row + kAhead]);
          fetch(values + int64_t{from[row + kAhead]} * Inputs);
        }
        for (; at + gapfx::linear::kAlign <= stop; at += gapfx::linear::kAlign)
#pragma GCC unroll 4
          for (int q = 0; q < gapfx::linear::kAlign; ++q)
#pragma GCC unroll 4
            for (int i = 0; i < Inputs; ++i)
              add_scaled(sum, values[(at + q) * Inputs + i], lanes_of<Width>(x, p.columns[at + q] * Inputs + i));
        for (; at < stop; ++at)
          for (int i = 0; i < Inputs; ++i)
            add_scaled(sum, values[at * Inputs + i], lanes_of<Width>(x, p.columns[at] * Inputs + i));
        end_sums(sum, out);
      }
    }
}

// Four outputs a row, which share the loads of x. Values of one output follow each other.
template <int Width>
GAPFX_FN void block_product_of(const Pattern& p, const float* values, const float* bias, const float* panel,
                               int64_t begin, int64_t end, float* y) {
  constexpr int kPasses = num_passes(Width, kLanes == 16 ? 4 : 2), kRegisters = Width / kLanes / kPasses;
  const int32_t *firsts = p.starts, *lasts = p.starts + p.tiles * p.rows;
  Ahead ahead = ahead_of(p, values, begin, end, kPasses * p.tiles * (end - begin));
  for (int pass = 0; pass < kPasses; ++pass)
    for (int64_t tile = 0; tile < p.tiles; ++tile) {
      const int32_t *from = p.starts + tile * p.tile_step, *to = from + p.next;
      const float* x = panel + pass * kRegisters * kLanes;
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = firsts[row], length = lasts[row] - first;
        const float* value = values + kBlock * first - first;
        float* out = y + (row - begin) * kBlock * Width + pass * kRegisters * kLanes;
        step(ahead.columns);
        step(ahead.values);
        if (row + kAhead < end) {
          const int64_t next = firsts[row + kAhead], step = lasts[row + kAhead] - next;
          fetch(p.columns + from[row + kAhead]);
          for (int i = 0; i < kBlock; ++i) fetch(values + kBlock * next - next + i * step + from[row + kAhead]);
        }
        Vec sum[kBlock][kRegisters];
#pragma GCC unroll 4
        for (int i = 0; i < kBlock; ++i)
          begin_sums(sum[i], tile, bias ? bias + row * kBlock + i : nullptr, out + i * Width);
        for (int64_t at = from[row]; at < to[row]; ++at) {
          const float* here = lanes_of<Width>(x, p.columns[at]);
          Vec lanes[kRegisters];
#pragma GCC unroll 4
          for (int r = 0; r < kRegisters; ++r) lanes[r] = load(here + r * kLanes);
#pragma GCC unroll 4
          for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 4
            for (int r = 0; r < kRegisters; ++r) sum[i][r] += lanes[r] * value[i * length + at];
        }
#pragma GCC unroll 4
        for (int i = 0; i < kBlock; ++i) end_sums(sum[i], out + i * Width);
      }
    }
}

#define GAPFX_BY_WIDTH(width, ...)                    \
  switch (width) {                                    \
    case 16: { constexpr int kWidth = 16; __VA_ARGS__; break; } \
    case 32: { constexpr int kWidth = 32; __VA_ARGS__; break; } \
    case 48: { constexpr int kWidth = 48; __VA_ARGS__; break; } \
    default: { constexpr int kWidth = 64; __VA_ARGS__; break; } \
  }

template <int Inputs>
GAPFX_FN void product(const Pattern& p, const float* values, const float* bias, Panel x, int64_t begin, int64_t end,
                      float* y) {
  GAPFX_BY_WIDTH(x.width, product_of<kWidth, Inputs>(p, values, bias, x.data, begin, end, y))
}

GAPFX_FN void block_product(const Pattern& p, const float* values, const float* bias, Panel x, int64_t begin,
                            int64_t end, float* y) {
  GAPFX_BY_WIDTH(x.width, block_product_of<kWidth>(p, values, bias, x.data, begin, end, y))
}

// Keeps the compiler from computing the addresses of all entries before a loop over strips: they do not fit in registers.
#define GAPFX_READ_AGAIN() __asm__ volatile("" ::: "memory")

// The first entry of whole registers, counted from the row's first, at or behind `at`.
GAPFX_INLINE int64_t whole_from(int64_t at, int64_t first, int64_t step) {
  return first + (at - first + step - 1) / step * step;
}

// Entries whose sums are made together. More would take fewer instructions, and lie too far apart for the first cache.
constexpr int kEntries = kLanes == 16 ? 4 : kLanes;

// values[i] += the sum of sum[i], for the first `num`.
template <typename Totals>
GAPFX_INLINE void add_totals(Totals totals, int64_t num, float* values) {
  constexpr int kSize = sizeof(Totals) / sizeof(float);
  float part[kSize];
  std::memcpy(part, &totals, sizeof(Totals));
  if (num >= kSize) {
    for (int i = 0; i < kSize; ++i) values[i] += part[i];
  } else {
    for (int64_t i = 0; i < num; ++i) values[i] += part[i];
  }
}

template <int Width>
GAPFX_FN void gradient_of(const Pattern& p, const float* x, const float* gradient, int64_t begin, int64_t end,
                          float* values) {
  constexpr int kPasses = num_passes(Width, 4), kRegisters = Width / kLanes / kPasses;
  const int32_t* lasts = p.starts + p.tiles * p.rows;
  for (int64_t tile = 0; tile < p.tiles; ++tile) {
    const int32_t *from = p.starts + tile * p.tile_step, *to = from + p.next;
    for (int64_t row = begin; row < end; ++row) {
      if (row + kAhead < end) {
        fetch(p.columns + from[row + kAhead]);
        fetch(values + from[row + kAhead]);
      }
      const int64_t first = p.starts[row], last = lasts[row], stop = to[row];
      Vec lanes[kRegisters];
      if (kPasses == 1) load_lanes(lanes, gradient + row * Width);
      // They run over borders of tiles: only the last ones of a row are partly used.
      for (int64_t at = whole_from(from[row], first, kEntries); at < stop; at += kEntries) {
        Vec sum[kEntries] = {};
        for (int pass = 0; pass < kPasses; ++pass) {
          const int lane = pass * kRegisters * kLanes;
          if (kPasses > 1) GAPFX_READ_AGAIN();
          if (kPasses > 1) load_lanes(lanes, gradient + row * Width + lane);
#pragma GCC unroll 8
          for (int i = 0; i < kEntries; ++i) {
            const float* here = lanes_of<Width>(x + lane, p.columns[at + i]);
#pragma GCC unroll 4
            for (int r = 0; r < kRegisters; ++r) sum[i] += lanes[r] * load(here + r * kLanes);
          }
        }
        add_totals(sums(sum), last - at, values + at);
      }
    }
  }
}

GAPFX_FN void gradient(const Pattern& p, const Strips& strips, int64_t begin, int64_t end, float* values) {
  const float *x = strips.x, *g = strips.gradient;
  for (int s = 0; s < strips.num_whole; ++s, x += strips.x_stride, g += strips.gradient_stride)
    gradient_of<gapfx::linear::kPanel>(p, x, g, begin, end, values);
  if (strips.rest) GAPFX_BY_WIDTH(strips.rest, gradient_of<kWidth>(p, x, g, begin, end, values))
}

// sum[output][i]: the products of one strip of tokens for the four outputs of entry i, still spread over lanes.
template <int Width>
GAPFX_INLINE void add_block_strip(Vec (&sum)[kLanes], const float* x, const float* gradient, const uint16_t* columns) {
  constexpr int kTogether = kLanes / kBlock, kRegisters = kLanes == 16 && Width % 32 == 0 ? 2 : 1;
  for (int lane = 0; lane < Width; lane += kRegisters * kLanes) {
    GAPFX_READ_AGAIN();
    Vec lanes[kBlock][kRegisters];
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 2
      for (int r = 0; r < kRegisters; ++r) lanes[i][r] = load(gradient + i * Width + lane + r * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < kTogether; ++j) {
      const float* here = lanes_of<Width>(x + lane, columns[j]);
#pragma GCC unroll 2
      for (int r = 0; r < kRegisters; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < kBlock; ++i) sum[i * kTogether + j] += lanes[i][r] * load(here + r * kLanes);
    }
  }
}

GAPFX_FN void block_gradient(const Pattern& p, const Strips& strips, int64_t begin, int64_t end, float* values) {
  constexpr int kTogether = kLanes / kBlock;
  const int32_t* lasts = p.starts + p.tiles * p.rows;
  for (int64_t tile = 0; tile < p.tiles; ++tile) {
    const int32_t *from = p.starts + tile * p.tile_step, *to = from + p.next;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = p.starts[row], last = lasts[row], stop = to[row];
      if (row + kAhead < end) fetch(p.columns + from[row + kAhead]);
      for (int64_t at = whole_from(from[row], first, kTogether); at < stop; at += kTogether) {
        Vec sum[kLanes] = {};
        const float *x = strips.x, *g = strips.gradient + row * kBlock * gapfx::linear::kPanel;
        for (int s = 0; s < strips.num_whole; ++s, x += strips.x_stride, g += strips.gradient_stride)
          add_block_strip<gapfx::linear::kPanel>(sum, x, g, p.columns + at);
        if (strips.rest) {
          g += row * kBlock * (strips.rest - gapfx::linear::kPanel);
          GAPFX_BY_WIDTH(strips.rest, add_block_strip<kWidth>(sum, x, g, p.columns + at))
        }
        float part[kLanes];
        store(part, sums(sum));
        float* to_values = values + kBlock * first + (at - first);
        const int num = last - at < kTogether ? static_cast<int>(last - at) : kTogether;
        for (int i = 0; i < kBlock; ++i, to_values += last - first)
          for (int j = 0; j < num; ++j) to_values[j] += part[i * kTogether + j];
      }
    }
  }
}

constexpr gapfx::linear::Kernels kKernels = {
    {pack<uint16_t>, pack<float>}, {unpack<uint16_t>, unpack<float>}, product<1>, block_product, product<kBlock>,
    gradient,                      block_gradient,
};

#undef GAPFX_BY_WIDTH
#undef GAPFX_READ_AGAIN
