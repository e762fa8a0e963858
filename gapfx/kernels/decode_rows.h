// Rows under a bit mask for few tokens, in AVX-512. Included once for each type of values, in a namespace of its own that
// has Value, Token, Sum, zero, step and total, with GAPFX_LOOP for what is always inlined. No include guard.

// R streams of `length` rows each, `length` rows apart, for M tokens.
template <int R, int M, int PARTS>
GAPFX_LOOP void run(const Layout& w, const Token* x, int64_t stride, float* y, int64_t begin, int64_t length) {
  const int64_t words = words_of(w);
  const Value* v[R];
  const uint64_t* word[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    v[r] = static_cast<const Value*>(w.values) + w.starts[begin + r * length];
    word[r] = w.words + (begin + r * length) * words;
  }
  for (int64_t row = begin; row < begin + length; ++row) {
    Sum sum[R][M];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[r][m] = zero();
    for (int64_t at = 0; at < words; ++at)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint64_t live = *word[r]++;
        _mm_prefetch(reinterpret_cast<const char*>(v[r]) + kAhead, _MM_HINT_T0);
        step<M, PARTS>(sum[r], live, v[r], x + at * kWord, stride);
        v[r] += _mm_popcnt_u64(live);
      }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) y[m * w.outputs + row + r * length] = total(w, row + r * length, sum[r][m]);
  }
}

template <int M, int PARTS>
GAPFX_LOOP void rows(const Layout& w, const Token* x, int64_t stride, float* y, int64_t begin, int64_t end) {
  const int64_t length = (end - begin) / kStreams, rest = begin + kStreams * length;
  if (length) run<kStreams, M, PARTS>(w, x, stride, y, begin, length);
  if (rest < end) run<1, M, PARTS>(w, x, stride, y, rest, end - rest);
}

template <int PARTS>
GAPFX_LOOP void tokens(const Layout& w, const Token* x, int64_t stride, int count, float* y, int64_t begin, int64_t end) {
  int m = 0;
  for (; m + 4 <= count; m += 4)
    rows<4, PARTS>(w, x + m * PARTS * stride, stride, y + m * w.outputs, begin, end);
  if (m + 2 <= count) {
    rows<2, PARTS>(w, x + m * PARTS * stride, stride, y + m * w.outputs, begin, end);
    m += 2;
  }
  if (m < count) rows<1, PARTS>(w, x + m * PARTS * stride, stride, y + m * w.outputs, begin, end);
}
