// WKV6 backward of one chunk of C tokens.
//
// With S_t the state before token t and G_t the gradient of the state after it,
//
//   dr_t[i] = sum_j S_t[i][j] dy_t[j] + u[i] k_t[i] (v_t . dy_t)
//   dk_t[i] = sum_j G_t[i][j] v_t[j]  + u[i] r_t[i] (v_t . dy_t)
//   dv_t[j] = sum_i G_t[i][j] k_t[i]  + (sum_i r_t[i] u[i] k_t[i]) dy_t[j]
//   dw_t[i] = -exp(w_t[i]) q_t[i],   q_t[i] = d_t[i] sum_j S_t[i][j] G_t[i][j]
//   du[i]   = sum_t r_t[i] k_t[i] (v_t . dy_t)
//
// Written out in terms of the inputs, q_t is a sum over pairs of a source before t (the k v of a
// token, or the state before the chunk) and a target after t (the r dy of a token, or the gradient
// of the state after the chunk). The weight of a pair is the product of the decays between its two
// ends. q_t is computed as just this sum, over the pairs that have t between them. The usual
// identity, a difference of two cumulative sums, would cancel.
//
// The pairs within a chunk are visited level by level of a binary tree. At the level of blocks of m
// tokens, these are the pairs of two neighbouring blocks. Their decays are products from a token to
// the border between the blocks, so that they are numbers in [0, 1], as in the forward.
//
// Included by isa.inc inside the namespace of one instruction set.

constexpr int64_t kBackwardChunk = 16;

// One chunk of one head: rows [C, kPitch], of which the first `keys` or `values` are in use. A
// short chunk is filled up with tokens that leave the state as it is.
template <class T>
struct BackwardChunk {
  static constexpr int C = kBackwardChunk;
  static constexpr int64_t kPitch = kMaxHeadSize + 64 / sizeof(T);
  struct Rows {
    alignas(64) T row[C][kPitch];
    alignas(64) char apart[7 * 64];  // the same row of two Rows must not agree modulo 4 KiB
  };
  Rows v, grad_y, grad_v;  // [C, values]
  // [C, keys]. For a token t in its block of the current level: from_start is the product of the
  // decays from the block's start to t, to_end that from t to the block's end, both without t's
  // own; R = r from_start, K = k to_end. all[b] is the product of all decays of the block that
  // starts at token b. rate = exp(w).
  Rows R, K, from_start, to_end, all, rate;
  Rows grad_r, grad_k, q, sums;
  // For s <= t, A[t][s] is the factor of v_s in y_t, and M[t][s] = dy_t . v_s.
  alignas(64) T A[C][C], M[C][C];
  alignas(64) T u[kPitch], grad_u[kPitch];
  alignas(64) T decay[kPitch], decay_low[kPitch];  // of the whole chunk, in two parts
};

// The decays of the chunk's tokens and of the whole chunk. `all` holds w and is overwritten: all[t]
// becomes the decay of token t, and 1 for the rows after the last of the `tokens` that exist.
template <class T, class Length>
void backward_decays(Length keys, int64_t tokens, BackwardChunk<T>& c) {
  typedef Vec<T> V;
  constexpr int C = BackwardChunk<T>::C;
  for (int64_t t = tokens; t < C; t++)
    for (int64_t i = 0; i < keys; i += V::W) V(T(-1e9)).store(c.all.row[t] + i);
  for (int64_t i = 0; i < keys; i += V::W) {
    V product(T(1)), change(T(0));
    for (int t0 = 0; t0 < C; t0 += 4) {
      V w[4], rate[4], decay[4], changes[4];
      RWKV6_UNROLLED (int t = 0; t < 4; t++) w[t] = V::load(c.all.row[t0 + t] + i);
      decay_lanes(w, rate, decay, changes);
      RWKV6_UNROLLED (int t = 0; t < 4; t++) {
        change = fma(product, changes[t], change);
        product = product * decay[t];
        decay[t].store(c.all.row[t0 + t] + i);
        rate[t].store(c.rate.row[t0 + t] + i);
      }
    }
    V low(T(0));
    split_decay(product, change, product, low);
    product.store(c.decay + i);
    low.store(c.decay_low + i);
  }
}

// The pairs of a token with itself, whose weight is u: A[t][t], and the first terms of the
// gradients of r, k and u.
template <class T, class Length>
void backward_diagonal(Length keys, BackwardChunk<T>& c) {
  typedef Vec<T> V;
  constexpr int C = BackwardChunk<T>::C;
  for (int t0 = 0; t0 < C; t0 += 4) {
    V A[4];  // sum_i r u k
    for (V& a : A) a = V(T(0));
    for (int64_t i = 0; i < keys; i += V::W) {
      const V u = V::load(c.u + i);
      V grad_u = V::load(c.grad_u + i);
      RWKV6_UNROLLED (int a = 0; a < 4; a++) {
        const int t = t0 + a;
        const V r = V::load(c.R.row[t] + i), k = V::load(c.K.row[t] + i), m(c.M[t][t]);
        const V u_k = u * k;
        A[a] = fma(r, u_k, A[a]);
        grad_u = fma(r * m, k, grad_u);
        (m * u_k).store(c.grad_r.row[t] + i);
        (m * u * r).store(c.grad_k.row[t] + i);
      }
      grad_u.store(c.grad_u + i);
    }
    T lanes[V::W < 4 ? 4 : V::W];
    store_sums<4>(A, lanes);
    for (int a = 0; a < 4; a++) c.A[t0 + a][t0 + a] = lanes[a];
  }
}

// One level of the tree: for every two neighbouring blocks of m tokens, the pairs of a source in
// the left and a target in the right one. They add their terms to A, q and the gradients of r and
// k; then the two blocks are merged: from_start, to_end, R, K and `all` become those of a block of
// 2 m tokens. At m = 1 from_start and to_end are 1 and q is 0. Blocks after the last of the
// `tokens` that exist have no pairs.
template <int m, class T, class Length>
void intra_chunk_backward_level(Length keys, int64_t tokens, BackwardChunk<T>& c) {
  typedef Vec<T> V;
  typedef BackwardChunk<T> Chunk;
  constexpr int D = m < 4 ? m : 4;
  for (int left = 0; left + m < tokens; left += 2 * m) {
    const int right = left + m;
    for (int t = right; t < right + m; t += D)
      for (int s = left; s < right; s += D) {
        T weights[D * D];
        dots<D, D>(keys, Chunk::kPitch, c.R.row[t], c.K.row[s], weights);
        for (int a = 0; a < D; a++) memcpy(&c.A[t + a][s], weights + a * D, sizeof(T) * D);
      }
    for (int64_t i = 0; i < keys; i += V::W) {
      const V all_left = V::load(c.all.row[left] + i), all_right = V::load(c.all.row[right] + i);
      V r[m], k[m];
      RWKV6_UNROLLED (int a = 0; a < m; a++) {
        r[a] = V::load(c.R.row[right + a] + i);
        k[a] = V::load(c.K.row[left + a] + i);
      }
      V later(T(0));  // the terms of q_t: of the pairs whose target comes after t
      RWKV6_UNROLLED (int t = m - 1; t >= 0; t--) {
        V sum = V(c.M[right + t][left]) * k[0];
        RWKV6_UNROLLED (int s = 1; s < m; s++) sum = fma(V(c.M[right + t][left + s]), k[s], sum);
        const int at = right + t;
        const V decay = m == 1 ? V(T(1)) : V::load(c.from_start.row[at] + i);
        fma(decay, sum, V::load(c.grad_r.row[at] + i)).store(c.grad_r.row[at] + i);
        if (m == 2)
          later.store(c.q.row[at] + i);
        else if (t < m - 1)
          (V::load(c.q.row[at] + i) + later).store(c.q.row[at] + i);
        later = fma(r[t], sum, later);
        if (m == 1) V(T(1)).store(c.from_start.row[left] + i);
        (decay * all_left).store(c.from_start.row[at] + i);
        (r[t] * all_left).store(c.R.row[at] + i);
      }
      V earlier(T(0));  // the terms of q_s: of the pairs whose source comes before s
      RWKV6_UNROLLED (int s = 0; s < m; s++) {
        V sum = V(c.M[right][left + s]) * r[0];
        RWKV6_UNROLLED (int t = 1; t < m; t++) sum = fma(V(c.M[right + t][left + s]), r[t], sum);
        const int at = left + s;
        const V decay = m == 1 ? V(T(1)) : V::load(c.to_end.row[at] + i);
        fma(decay, sum, V::load(c.grad_k.row[at] + i)).store(c.grad_k.row[at] + i);
        if (m == 2)
          earlier.store(c.q.row[at] + i);
        else if (s)
          (V::load(c.q.row[at] + i) + earlier).store(c.q.row[at] + i);
        earlier = fma(k[s], sum, earlier);
        if (m == 1) V(T(1)).store(c.to_end.row[right] + i);
        (decay * all_right).store(c.to_end.row[at] + i);
        (k[s] * all_right).store(c.K.row[at] + i);
      }
      (all_left * all_right).store(c.all.row[left] + i);
    }
  }
  for (int64_t t = tokens; t < Chunk::C; t++)  // zero even where a decay before it is a NaN
    memset(c.R.row[t], 0, sizeof(T) * size_t(keys));
}

// The initial values of from_start, to_end and q, for a chunk of fewer than C tokens, some rows of
// which belong to no pair and would not be set.
template <class T, class Length>
void backward_init_short(Length keys, BackwardChunk<T>& c) {
  typedef Vec<T> V;
  for (int t = 0; t < BackwardChunk<T>::C; t++)
    for (int64_t i = 0; i < keys; i += V::W) {
      V(T(1)).store(c.from_start.row[t] + i);
      V(T(1)).store(c.to_end.row[t] + i);
      V(T(0)).store(c.q.row[t] + i);
    }
}

// All pairs within the chunk: A, and their terms of q and of the gradients of r, k, u and v.
template <class T, class Length>
void intra_chunk_backward(Length keys, Length values, int64_t tokens, BackwardChunk<T>& c) {
  typedef Vec<T> V;
  typedef BackwardChunk<T> Chunk;
  constexpr int C = Chunk::C;
  for (int t = 0; t < C; t += 4)
    for (int s = 0; s <= t; s += 4) {
      T products[16];
      dots<4, 4>(values, Chunk::kPitch, c.grad_y.row[t], c.v.row[s], products);
      for (int a = 0; a < 4; a++) memcpy(&c.M[t + a][s], products + 4 * a, sizeof(T) * 4);
    }
  backward_diagonal(keys, c);
  if (tokens < C) backward_init_short(keys, c);
  intra_chunk_backward_level<1>(keys, tokens, c);
  intra_chunk_backward_level<2>(keys, tokens, c);
  intra_chunk_backward_level<4>(keys, tokens, c);
  intra_chunk_backward_level<8>(keys, tokens, c);
  static_assert(C == 16);

  for (int64_t j = 0; j < values; j += V::W)  // grad_v_s = sum_t A[t][s] dy_t
    for (int s0 = 0; s0 < C; s0 += 4) {
      V sum[4];
      for (V& x : sum) x = V(T(0));
      RWKV6_UNROLLED (int t = 0; t < 4; t++) {
        if (s0 + t >= tokens) break;
        const V dy = V::load(c.grad_y.row[s0 + t] + j);
        RWKV6_UNROLLED (int s = 0; s <= t; s++) sum[s] = fma(V(c.A[s0 + t][s0 + s]), dy, sum[s]);
      }
      for (int t = s0 + 4; t < tokens; t++) {
        const V dy = V::load(c.grad_y.row[t] + j);
        RWKV6_UNROLLED (int s = 0; s < 4; s++) sum[s] = fma(V(c.A[t][s0 + s]), dy, sum[s]);
      }
      RWKV6_UNROLLED (int s = 0; s < 4; s++) sum[s].store(c.grad_v.row[s0 + s] + j);
    }
}

// The gradients of the chunk's tokens. S [values, keys] is the state before the chunk. G [values,
// keys] is the gradient of the state after it, and becomes that of S. q becomes the gradient of w.
// G_rows [keys, values] is scratch. state_matters is false where nothing depends on the state after
// the chunk: G is zeros then, but zero times a NaN would be a NaN.
template <class T, class Length>
void backward_chunk(Length keys, Length values, int64_t tokens, bool state_matters,
                    BackwardChunk<T>& c, const T* S, T* G, T* G_rows, Prefetcher& prefetcher) {
  typedef Vec<T> V;
  constexpr int C = BackwardChunk<T>::C;
  constexpr int64_t kPitch = BackwardChunk<T>::kPitch;
  intra_chunk_backward(keys, values, tokens, c);
  if (state_matters) {
    transpose(values, keys, G, G_rows);
    multiply<C, true>(keys, values, kPitch, c.K.row[0], G_rows, c.grad_v.row[0], prefetcher);
  }

  multiply<C, false>(values, keys, kPitch, c.grad_y.row[0], S, c.sums.row[0], prefetcher);
  for (int64_t i = 0; i < keys; i += V::W) {  // pairs whose source is the state before the chunk
    V through[4];  // sum_j S G: this pair has every token of the chunk between its ends
    for (V& x : through) x = V(T(0));
    for (int64_t j = 0; j < values; j += 4)
      RWKV6_UNROLLED (int a = 0; a < 4; a++)
        if (j + a < values)
          through[a] =
              fma(V::load(S + (j + a) * keys + i), V::load(G + (j + a) * keys + i), through[a]);
    const V sum = through[0] + through[1] + (through[2] + through[3]);
    V later = state_matters ? sum * V::load(c.all.row[0] + i) : V(T(0));
    for (int t = C - 1; t >= 0; t--) {
      const V sum = V::load(c.sums.row[t] + i);
      fma(V::load(c.from_start.row[t] + i), sum, V::load(c.grad_r.row[t] + i))
          .store(c.grad_r.row[t] + i);
      (V::load(c.q.row[t] + i) + later).store(c.q.row[t] + i);
      later = fma(V::load(c.R.row[t] + i), sum, later);
    }
  }
  if (!state_matters) {  // G is zeros, and a zero times a NaN would be a NaN
    for (int t = 0; t < C; t++) {
      memset(c.v.row[t], 0, sizeof(T) * size_t(values));
      memset(c.K.row[t], 0, sizeof(T) * size_t(keys));
      memset(c.to_end.row[t], 0, sizeof(T) * size_t(keys));
    }
    for (T* row : {c.decay, c.decay_low, c.q.row[tokens - 1]})
      memset(row, 0, sizeof(T) * size_t(keys));
  }
  multiply<C, false>(values, keys, kPitch, c.v.row[0], G, c.sums.row[0], prefetcher);
  for (int64_t i = 0; i < keys; i += V::W) {  // pairs whose target is the state after the chunk
    V earlier(T(0));
    for (int t = 0; t < C; t++) {
      const V sum = V::load(c.sums.row[t] + i);
      fma(V::load(c.to_end.row[t] + i), sum, V::load(c.grad_k.row[t] + i))
          .store(c.grad_k.row[t] + i);
      const V q = V::load(c.q.row[t] + i) + earlier;
      (V(T(0)) - V::load(c.rate.row[t] + i) * q).store(c.q.row[t] + i);
      earlier = fma(V::load(c.K.row[t] + i), sum, earlier);
    }
  }
  update<C>(values, keys, kPitch, c.decay, c.decay_low, c.grad_y.row[0], c.R.row[0], G, G,
            prefetcher);
}
