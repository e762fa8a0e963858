// The kernels of a sparse convolution, compiled once for each level: GAPFX_WIDTH floats in a vector, GAPFX_SUMS vectors
// of sums that stay in registers, GAPFX_EVERY 1 where AVX-512 is at hand.

constexpr int kWidth = GAPFX_WIDTH;
constexpr int kPerVector = kVector / kWidth;
constexpr int64_t kRowsAhead = 4;
typedef float Wide __attribute__((vector_size(GAPFX_WIDTH * 4)));

inline Wide load(const float* at) {
  Wide wide;
  std::memcpy(&wide, at, sizeof(wide));
  return wide;
}

inline void store(float* at, Wide wide) { std::memcpy(at, &wide, sizeof(wide)); }

inline Wide spread(float value) { return value - Wide{}; }

// The next rows' weights of a tile lie far apart, where no processor foresees them.
inline void foresee_row(const Tile& tile, const int32_t* at, const float* values) {
  for (int64_t j = at[0]; j < at[1] + 15; j += 16) __builtin_prefetch(values + j);
  for (int64_t j = at[0]; j < at[1] + 31; j += 32) __builtin_prefetch(tile.columns + j);
}

// The weights of a row, `N` vectors of sums; two weights in turn where the sums fit twice, to hide latency.
template <int N>
inline void multiply_row(const uint16_t* columns, const float* values, int64_t count, const float* tile, bool begins,
                         float first, float* sums) {
  constexpr bool is_paired = 2 * N <= GAPFX_SUMS;
  Wide even[N], odd[N];
  for (int i = 0; i < N; ++i) even[i] = begins ? spread(first) : load(sums + i * kWidth);
  for (int i = 0; i < N; ++i) odd[i] = Wide{};
  int64_t j = 0;
  if (is_paired)
    for (; j + 2 <= count; j += 2) {
      const float *a = tile + int64_t{columns[j]} * kLanes, *b = tile + int64_t{columns[j + 1]} * kLanes;
      const Wide x = spread(values[j]), y = spread(values[j + 1]);
      for (int i = 0; i < N; ++i) even[i] += x * load(a + i * kWidth);
      for (int i = 0; i < N; ++i) odd[i] += y * load(b + i * kWidth);
    }
  for (; j < count; ++j) {
    const float* a = tile + int64_t{columns[j]} * kLanes;
    const Wide x = spread(values[j]);
    for (int i = 0; i < N; ++i) even[i] += x * load(a + i * kWidth);
  }
  for (int i = 0; i < N; ++i) store(sums + i * kWidth, is_paired ? even[i] + odd[i] : even[i]);
}

template <int N>
void multiply_rows(const Tile& tile, const float* values, const float* columns, bool begins, const float* bias,
                   float* sums) {
  for (int64_t row = 0; row < tile.rows; ++row, sums += kLanes) {
    const int32_t* at = tile.starts + row * tile.stride;
    if (row + kRowsAhead < tile.rows) foresee_row(tile, at + kRowsAhead * tile.stride, values);
    if (at[0] == at[1] && !begins) continue;
    multiply_row<N>(tile.columns + at[0], values + at[0], at[1] - at[0], columns, begins, bias ? bias[row] : 0.0f, sums);
  }
}

// Four rows that share their columns, `N` vectors of sums each.
template <int N>
void multiply_fours(const Tile& tile, const float* values, const float* columns, bool begins, const float* bias,
                    float* sums) {
  for (int64_t row = 0; row < tile.rows; row += 4, sums += 4 * kLanes) {
    const int32_t* at = tile.starts + row * tile.stride;
    const int64_t count = at[1] - at[0];
    const uint16_t* live = tile.columns + at[0];
    const float* of_row[4];
    Wide total[4][N];
    for (int r = 0; r < 4; ++r) {
      of_row[r] = values + at[r * tile.stride];
      for (int i = 0; i < N; ++i)
        total[r][i] = begins ? spread(bias ? bias[row + r] : 0.0f) : load(sums + r * kLanes + i * kWidth);
    }
    for (int64_t j = 0; j < count; ++j) {
      const float* a = columns + int64_t{live[j]} * kLanes;
      Wide x[N];
      for (int i = 0; i < N; ++i) x[i] = load(a + i * kWidth);
      for (int r = 0; r < 4; ++r) {
        const Wide weight = spread(of_row[r][j]);
        for (int i = 0; i < N; ++i) total[r][i] += weight * x[i];
      }
    }
    for (int r = 0; r < 4; ++r)
      for (int i = 0; i < N; ++i) store(sums + r * kLanes + i * kWidth, total[r][i]);
  }
}

template <int N>
inline float dot(const float* a, const float* b) {
  Wide sum = load(a) * load(b);
  for (int i = 1; i < N; ++i) sum += load(a + i * kWidth) * load(b + i * kWidth);
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += sum[i];
  return total;
}

#if GAPFX_EVERY

// Lane i of the result is the sum of vector i.
inline __m512 sum_each(const __m512* v) {
  __m512 t[8], s[4];
  for (int i = 0; i < 8; ++i)
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    s[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(s[0], s[1], 0x88), _mm512_shuffle_f32x4(s[0], s[1], 0xdd));
  const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(s[2], s[3], 0x88), _mm512_shuffle_f32x4(s[2], s[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

template <int N>
inline __m512 products(const __m512* row, const float* column) {
  __m512 sum = _mm512_mul_ps(row[0], _mm512_loadu_ps(column));
  for (int i = 1; i < N; ++i) sum = _mm512_fmadd_ps(row[i], _mm512_loadu_ps(column + i * kWidth), sum);
  return sum;
}

template <int N>
void dots_of(const Tile& tile, const float* columns, const float* gradient, bool begins, float* values) {
  for (int64_t row = 0; row < tile.rows; ++row, gradient += kLanes) {
    const int32_t* at = tile.starts + row * tile.stride;
    if (row + kRowsAhead < tile.rows) foresee_row(tile, at + kRowsAhead * tile.stride, values);
    __m512 of_row[N];
    for (int i = 0; i < N; ++i) of_row[i] = _mm512_loadu_ps(gradient + i * kWidth);
    for (int64_t j = at[0]; j < at[1]; j += 16) {
      const int count = at[1] - j < 16 ? at[1] - j : 16;
      const uint16_t* live = tile.columns + j;
      __m512 sums[16];
      if (count == 16) {
        for (int i = 0; i < 16; ++i) sums[i] = products<N>(of_row, columns + int64_t{live[i]} * kLanes);
      } else {
        for (int i = 0; i < 16; ++i)
          sums[i] = i < count ? products<N>(of_row, columns + int64_t{live[i]} * kLanes) : _mm512_setzero_ps();
      }
      const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
      __m512 total = sum_each(sums);
      if (!begins) total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(mask, values + j));
      _mm512_mask_storeu_ps(values + j, mask, total);
    }
  }
}

inline __m512 piece_of(const Piece& piece, __m512i index, const float* planes) {
  const __m512 low = _mm512_maskz_loadu_ps(piece.low, planes + piece.base);
  if (!piece.high) return _mm512_maskz_permutexvar_ps(piece.lanes, index, low);
  const __m512 high = _mm512_maskz_loadu_ps(piece.high, planes + piece.base + kVector);
  return _mm512_maskz_permutex2var_ps(piece.lanes, low, index, high);
}

// Planes lie far apart, where no processor foresees them: the lines that the next panel will read of a plane.
inline void foresee(const float* at) { _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1); }

// How far the next panel's vectors lie from this one's, as far as one can tell.
template <int N>
int64_t panel_step(const Panel& panel) {
  if (N == 1) return panel.in_vectors[0].pieces[0].index[kVector - 1] + 1;
  return (panel.in_vectors[N - 1].pieces[0].base - panel.in_vectors[0].pieces[0].base) / (N - 1 + (N == 1)) * N;
}

// N vectors that are whole runs.
template <int N>
void extract_runs(const Panel& panel, const float* planes, const Columns& columns, float* tile) {
  const float* from[N];
  for (int v = 0; v < N; ++v) from[v] = planes + panel.in_vectors[v].pieces[0].base;
  const int64_t next = panel_step<N>(panel), *offsets = columns.offsets;
  for (int64_t k = 0, last = columns.last_tap; k < columns.count; ++k, tile += kLanes) {
    if (k == last) {
      for (int v = 0; v < N; ++v) foresee(from[v] + offsets[k] + next);
      last += columns.taps;
    }
    for (int v = 0; v < N; ++v) _mm512_store_ps(tile + v * kVector, _mm512_loadu_ps(from[v] + offsets[k]));
  }
}

// N vectors of one piece each.
template <int N>
void extract_pieces(const Panel& panel, const float* planes, const Columns& columns, float* tile) {
  const float* from[N];
  __m512i index[N];
  __mmask16 low[N], high[N], lanes[N];
  bool is_run[N];
  for (int v = 0; v < N; ++v) {
    is_run[v] = panel.in_vectors[v].is_run;
    const Piece& piece = panel.in_vectors[v].pieces[0];
    from[v] = planes + piece.base;
    index[v] = _mm512_loadu_si512(piece.index);
    low[v] = piece.low, high[v] = piece.high, lanes[v] = piece.lanes;
  }
  const int64_t next = panel_step<N>(panel), *offsets = columns.offsets;
  for (int64_t k = 0, last = columns.last_tap; k < columns.count; ++k, tile += kLanes) {
    if (k == last) {
      for (int v = 0; v < N; ++v) foresee(from[v] + offsets[k] + next);
      last += columns.taps;
    }
    for (int v = 0; v < N; ++v) {
      const float* at = from[v] + offsets[k];
      if (is_run[v]) {
        _mm512_store_ps(tile + v * kVector, _mm512_loadu_ps(at));
        continue;
      }
      const __m512 near = _mm512_maskz_loadu_ps(low[v], at), far = _mm512_maskz_loadu_ps(high[v], at + kVector);
      _mm512_store_ps(tile + v * kVector, _mm512_maskz_permutex2var_ps(lanes[v], near, index[v], far));
    }
  }
}

void extract_any(const Panel& panel, const float* planes, const Columns& columns, float* tile) {
  const int64_t* offsets = columns.offsets;
  for (int64_t k = 0; k < columns.count; ++k, tile += kLanes)
    for (int v = 0; v < panel.vectors; ++v) {
      const VectorOfLanes& vector = panel.in_vectors[v];
      __m512 all = _mm512_setzero_ps();
      for (int p = 0; p < vector.num_pieces; ++p) {
        const Piece& piece = vector.pieces[p];
        all = _mm512_or_ps(all, piece_of(piece, _mm512_loadu_si512(piece.index), planes + offsets[k]));
      }
      _mm512_store_ps(tile + v * kVector, all);
    }
}

template <int N>
void extract_vectors(const Panel& panel, const float* planes, const Columns& columns, float* tile) {
  bool are_runs = true, are_pieces = true;
  for (int v = 0; v < N; ++v) {
    are_runs = are_runs && panel.in_vectors[v].is_run;
    are_pieces = are_pieces && panel.in_vectors[v].num_pieces == 1;
  }
  if (are_runs) return extract_runs<N>(panel, planes, columns, tile);
  if (are_pieces) return extract_pieces<N>(panel, planes, columns, tile);
  extract_any(panel, planes, columns, tile);
}

void extract(const Panel& panel, const float* planes, const Columns& columns, float* tile) {
  switch (panel.vectors) {
    case 1: return extract_vectors<1>(panel, planes, columns, tile);
    case 2: return extract_vectors<2>(panel, planes, columns, tile);
    case 3: return extract_vectors<3>(panel, planes, columns, tile);
    case 4: return extract_vectors<4>(panel, planes, columns, tile);
  }
}

#else

template <int N>
void dots_of(const Tile& tile, const float* columns, const float* gradient, bool begins, float* values) {
  for (int64_t row = 0; row < tile.rows; ++row, gradient += kLanes) {
    const int32_t* at = tile.starts + row * tile.stride;
    for (int64_t j = at[0]; j < at[1]; ++j) {
      const float sum = dot<N>(gradient, columns + int64_t{tile.columns[j]} * kLanes);
      values[j] = begins ? sum : values[j] + sum;
    }
  }
}

void extract(const Panel& panel, const float* planes, const Columns& columns, float* tile) {
  for (int64_t k = 0; k < columns.count; ++k, tile += kLanes) {
    const float* from = planes + columns.offsets[k];
    for (int r = 0; r < panel.num_runs; ++r) {
      const Run& run = panel.runs[r];
      for (int i = 0; i < run.size; ++i) tile[run.lane + i] = from[run.at + i];
    }
    for (int i = panel.count; i < panel.vectors * kVector; ++i) tile[i] = 0;
  }
}

#endif

void multiply(const Tile& tile, const float* values, const float* columns, int vectors, bool begins, const float* bias,
              float* sums) {
  constexpr int most = GAPFX_SUMS < 8 ? GAPFX_SUMS : 8;
  int left = vectors * kPerVector;
  for (; left > most; left -= most, columns += most * kWidth, sums += most * kWidth)
    multiply_rows<most>(tile, values, columns, begins, bias, sums);
  switch (left) {
    case 1: return multiply_rows<1>(tile, values, columns, begins, bias, sums);
    case 2: return multiply_rows<2>(tile, values, columns, begins, bias, sums);
    case 3: return multiply_rows<3>(tile, values, columns, begins, bias, sums);
    case 4: return multiply_rows<4>(tile, values, columns, begins, bias, sums);
    case 6: return multiply_rows<6>(tile, values, columns, begins, bias, sums);
    case 8: return multiply_rows<8>(tile, values, columns, begins, bias, sums);
  }
}

void multiply_blocks(const Tile& tile, const float* values, const float* columns, int vectors, bool begins,
                     const float* bias, float* sums) {
  constexpr int most = GAPFX_EVERY ? 4 : 2;
  int left = vectors * kPerVector;
  for (; left > most; left -= most, columns += most * kWidth, sums += most * kWidth)
    multiply_fours<most>(tile, values, columns, begins, bias, sums);
  switch (left) {
    case 1: return multiply_fours<1>(tile, values, columns, begins, bias, sums);
    case 2: return multiply_fours<2>(tile, values, columns, begins, bias, sums);
    case 3: return multiply_fours<3>(tile, values, columns, begins, bias, sums);
    case 4: return multiply_fours<4>(tile, values, columns, begins, bias, sums);
  }
}

void dots(const Tile& tile, const float* columns, const float* gradient, int vectors, bool begins, float* values) {
  switch (vectors) {
    case 1: return dots_of<1 * kPerVector>(tile, columns, gradient, begins, values);
    case 2: return dots_of<2 * kPerVector>(tile, columns, gradient, begins, values);
    case 3: return dots_of<3 * kPerVector>(tile, columns, gradient, begins, values);
    case 4: return dots_of<4 * kPerVector>(tile, columns, gradient, begins, values);
  }
}

const Kernels all = {extract, multiply, multiply_blocks, dots};
