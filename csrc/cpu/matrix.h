// Products of small row-major matrices, of which the chunked backward consists. Lengths are whole
// vectors. A Length is an int64_t or, for the head sizes with a fast path, a compile-time constant
// that converts to one.
// Included by isa.inc inside the namespace of one instruction set.

// out[a * S + b] = x[a] . y[b] for R rows x and S rows y of n values, `pitch` apart.
template <int R, int S, class T, class Length>
RWKV6_INLINE void dots(Length n, int64_t pitch, const T* x, const T* y, T* out) {
  typedef Vec<T> V;
  V sums[R * S];
  for (V& sum : sums) sum = V(T(0));
  for (int64_t i = 0; i < n; i += V::W) {
    V x_i[R];
    RWKV6_UNROLLED (int a = 0; a < R; a++) x_i[a] = V::load(x + a * pitch + i);
    RWKV6_UNROLLED (int b = 0; b < S; b++) {
      const V y_i = V::load(y + b * pitch + i);
      RWKV6_UNROLLED (int a = 0; a < R; a++) sums[a * S + b] = fma(x_i[a], y_i, sums[a * S + b]);
    }
  }
  T lanes[(R * S + V::W - 1) / V::W * V::W];
  store_sums<R * S>(sums, lanes);
  memcpy(out, lanes, sizeof(T) * R * S);
}

// Calls f(integral_constant<int, q>, i) for n columns in blocks of q vectors from column i on: q =
// Q as long as so many are left, then 1.
template <int Q, class T, class Length, class F>
RWKV6_INLINE void for_columns(Length n, const F& f) {
  int64_t i = 0;
  for (; i + Q * Vec<T>::W <= n; i += Q * Vec<T>::W) f(std::integral_constant<int, Q>(), i);
  for (; i < n; i += Vec<T>::W) f(std::integral_constant<int, 1>(), i);
}

// out[t][i] = (Add: out[t][i]) + sum_x a[t][x] M[x][i] for C tokens t, x < m, i < n; rows of out
// and a are `pitch` apart, those of M n.
template <int C, bool Add, class T, class Length>
RWKV6_INLINE void multiply(Length m, Length n, int64_t pitch, const T* a, const T* M, T* out,
                           Prefetcher& prefetcher) {
  typedef Vec<T> V;
  constexpr int R = RWKV6_TILE_ROWS;
  for_columns<2, T>(n, [&](auto q_count, int64_t i) {
    constexpr int Q = q_count;
    for (int t = 0; t < C; t += R) {
      V sum[R][Q];
      RWKV6_UNROLLED (int b = 0; b < R; b++)
        RWKV6_UNROLLED (int q = 0; q < Q; q++)
          sum[b][q] = Add ? V::load(out + (t + b) * pitch + i + q * V::W) : V(T(0));
      for (int64_t x = 0; x < m; x++) {
        V row[Q];
        RWKV6_UNROLLED (int q = 0; q < Q; q++) row[q] = V::load(M + x * n + i + q * V::W);
        RWKV6_UNROLLED (int b = 0; b < R; b++) {
          const V scalar(a[(t + b) * pitch + x]);
          RWKV6_UNROLLED (int q = 0; q < Q; q++) sum[b][q] = fma(scalar, row[q], sum[b][q]);
        }
        if (x % 2) prefetcher.next_line();
      }
      RWKV6_UNROLLED (int b = 0; b < R; b++)
        RWKV6_UNROLLED (int q = 0; q < Q; q++)
          sum[b][q].store(out + (t + b) * pitch + i + q * V::W);
    }
  });
}

// to[x][i] = (decay[i] + decay_low[i]) from[x][i] + sum_t a[t][x] b[t][i] for x < m, i < n and C
// tokens t.
template <int C, class T, class Length>
RWKV6_INLINE void update(Length m, Length n, int64_t pitch, const T* decay, const T* decay_low,
                         const T* a, const T* b, const T* from, T* to, Prefetcher& prefetcher) {
  typedef Vec<T> V;
  constexpr int R = RWKV6_TILE_ROWS < V::W ? RWKV6_TILE_ROWS : V::W;  // divides m
  for_columns<2, T>(n, [&](auto q_count, int64_t i) {
    constexpr int Q = q_count;
    for (int64_t x = 0; x < m; x += R) {
      V M[R][Q];
      RWKV6_UNROLLED (int r = 0; r < R; r++)
        RWKV6_UNROLLED (int q = 0; q < Q; q++) {
          const V old = V::load(from + (x + r) * n + i + q * V::W);
          const V rest = V::load(decay_low + i + q * V::W) * old;
          M[r][q] = fma(V::load(decay + i + q * V::W), old, rest);
        }
      RWKV6_UNROLLED (int t = 0; t < C; t++) {
        V row[Q];
        RWKV6_UNROLLED (int q = 0; q < Q; q++) row[q] = V::load(b + t * pitch + i + q * V::W);
        RWKV6_UNROLLED (int r = 0; r < R; r++) {
          const V scalar(a[t * pitch + x + r]);
          RWKV6_UNROLLED (int q = 0; q < Q; q++) M[r][q] = fma(scalar, row[q], M[r][q]);
        }
        prefetcher.next_line();
      }
      RWKV6_UNROLLED (int r = 0; r < R; r++)
        RWKV6_UNROLLED (int q = 0; q < Q; q++) M[r][q].store(to + (x + r) * n + i + q * V::W);
    }
  });
}

// One step of a transposition by blocks: in every square of 2 * half lanes that rows a and b belong
// to, the off-diagonal blocks are exchanged.
template <int half, class V, int... lane>
RWKV6_INLINE void exchange(V& a, V& b, std::integer_sequence<int, lane...>) {
  const V x = a, y = b;
  a = V(Shuffle<(lane / half % 2 ? lane - half + V::W : lane)...>::of(x.x, y.x));
  b = V(Shuffle<(lane / half % 2 ? lane + V::W : lane + half)...>::of(x.x, y.x));
}
template <int half, class V>
RWKV6_INLINE void transpose_square(V* rows) {
  RWKV6_UNROLLED (int x = 0; x < V::W; x++)
    if (x / half % 2 == 0)
      exchange<half>(rows[x], rows[x + half], std::make_integer_sequence<int, int(V::W)>());
  if constexpr (half > 1) transpose_square<half / 2>(rows);
}

// out [n, m] = the transpose of M [m, n].
template <class T, class Length>
RWKV6_INLINE void transpose(Length m, Length n, const T* M, T* out) {
  typedef Vec<T> V;
  for (int64_t x = 0; x < m; x += V::W)
    for (int64_t i = 0; i < n; i += V::W) {
      V rows[V::W];
      RWKV6_UNROLLED (int a = 0; a < V::W; a++) rows[a] = V::load(M + (x + a) * n + i);
      transpose_square<int(V::W) / 2>(rows);
      RWKV6_UNROLLED (int a = 0; a < V::W; a++) rows[a].store(out + (i + a) * m + x);
    }
}
