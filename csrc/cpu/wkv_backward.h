// WKV6 backward, in chunks of C tokens.
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
// the border between the blocks, again of numbers in [0, 1].
//
// Only the inputs are saved by the forward. The backward first runs through the sequence and keeps
// the state before every segment. Then, segment by segment from the last to the first, it
// recomputes the state before each chunk and goes through the chunks in reverse. S and G are stored
// transposed, with the values as rows. The heads are processed in turn, chunk by chunk, because
// their rows are neighbours in memory.
// Included by isa.inc inside the namespace of one instruction set.

constexpr int64_t kBackwardChunk = 16;
constexpr int64_t kSegment = 64;       // tokens; a checkpoint each costs N / 64 of an f32 tensor
constexpr int64_t kBackwardHeads = 4;  // whose states of a segment fit in the second-level cache
// Bytes of the checkpoints of the heads that take turns; more if even kBackwardHeads need it.
constexpr int64_t kCheckpoints = int64_t(1) << 24;
// Gradients of as many bytes are out of the caches before anybody reads them.
constexpr int64_t kStreamed = int64_t(1) << 24;

// One chunk of one head: rows [C, kPitch], of which the first `keys` or `values` are in use. Short
// chunks are filled with tokens that leave everything as it is.
template <class T>
struct BackwardChunk {
  static constexpr int C = kBackwardChunk;
  static constexpr int64_t kPitch = kMaxHeadSize + 64 / sizeof(T);
  struct Rows {
    alignas(64) T row[C][kPitch];
    alignas(64) char apart[7 * 64];  // the same row of two Rows must not agree modulo 4 KiB
  };
  Rows v, grad_y, grad_v;  // [C, values]
  // [C, keys]. Of a token t in a block of the level so far: F is the product of the decays from the
  // block's start to t, G that from t to the block's end, both without t; R = r F, K = k G; all[b]
  // is the product over the block that starts at b.
  Rows R, K, F, G, all, rate;  // rate = exp(w)
  Rows grad_r, grad_k, q, sums;
  // [t][s] for s <= t: the weight of v_s in y_t; dy_t . v_s
  alignas(64) T A[C][C], M[C][C];
  alignas(64) T u[kPitch], grad_u[kPitch];
  alignas(64) T decay[kPitch], decay_low[kPitch];  // of the whole chunk, in two parts
};

// Decays of the chunk's tokens from w, in their place, and that of the whole chunk; all[t] becomes
// the decay of token t, 1 behind the last of the `tokens` that are there.
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

// Pairs of a token with itself, weighted with u.
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

// Pairs of a source in the left and a target in the right block of m tokens, for all pairs of
// neighbouring blocks, which become one. F and G start as 1, at m = 1, and q as 0. Blocks behind
// the last of the `tokens` that are there have no pairs.
template <int m, class T, class Length>
void backward_level(Length keys, int64_t tokens, BackwardChunk<T>& c) {
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
      V later(T(0));  // of the pairs whose target lies behind t
      RWKV6_UNROLLED (int t = m - 1; t >= 0; t--) {
        V sum = V(c.M[right + t][left]) * k[0];
        RWKV6_UNROLLED (int s = 1; s < m; s++) sum = fma(V(c.M[right + t][left + s]), k[s], sum);
        const int at = right + t;
        const V F = m == 1 ? V(T(1)) : V::load(c.F.row[at] + i);
        fma(F, sum, V::load(c.grad_r.row[at] + i)).store(c.grad_r.row[at] + i);
        if (m == 2)
          later.store(c.q.row[at] + i);
        else if (t < m - 1)
          (V::load(c.q.row[at] + i) + later).store(c.q.row[at] + i);
        later = fma(r[t], sum, later);
        if (m == 1) V(T(1)).store(c.F.row[left] + i);
        (F * all_left).store(c.F.row[at] + i);
        (r[t] * all_left).store(c.R.row[at] + i);
      }
      V earlier(T(0));  // of the pairs whose source lies before s
      RWKV6_UNROLLED (int s = 0; s < m; s++) {
        V sum = V(c.M[right][left + s]) * r[0];
        RWKV6_UNROLLED (int t = 1; t < m; t++) sum = fma(V(c.M[right + t][left + s]), r[t], sum);
        const int at = left + s;
        const V G = m == 1 ? V(T(1)) : V::load(c.G.row[at] + i);
        fma(G, sum, V::load(c.grad_k.row[at] + i)).store(c.grad_k.row[at] + i);
        if (m == 2)
          earlier.store(c.q.row[at] + i);
        else if (s)
          (V::load(c.q.row[at] + i) + earlier).store(c.q.row[at] + i);
        earlier = fma(k[s], sum, earlier);
        if (m == 1) V(T(1)).store(c.G.row[right] + i);
        (G * all_right).store(c.G.row[at] + i);
        (k[s] * all_right).store(c.K.row[at] + i);
      }
      (all_left * all_right).store(c.all.row[left] + i);
    }
  }
  for (int64_t t = tokens; t < Chunk::C; t++)  // zero, also where decays before it are none
    memset(c.R.row[t], 0, sizeof(T) * size_t(keys));
}

// What a chunk with less than C tokens has no pairs for.
template <class T, class Length>
void backward_start_short(Length keys, BackwardChunk<T>& c) {
  typedef Vec<T> V;
  for (int t = 0; t < BackwardChunk<T>::C; t++)
    for (int64_t i = 0; i < keys; i += V::W) {
      V(T(1)).store(c.F.row[t] + i);
      V(T(1)).store(c.G.row[t] + i);
      V(T(0)).store(c.q.row[t] + i);
    }
}

// The gradients of the chunk's tokens, from the state S [values, keys] that it starts from and the
// gradient G [values, keys] of the state that it ends with, which becomes that of S. G_rows [keys,
// values] is scratch. q becomes the gradient of w. Where nothing depends on the state that the
// chunk ends with, G holds zeros and is not `there`: zero times a NaN would be one.
template <class T, class Length>
void backward_chunk(Length keys, Length values, int64_t tokens, bool there, BackwardChunk<T>& c,
                    const T* S, T* G, T* G_rows, Fetch& fetch) {
  typedef Vec<T> V;
  typedef BackwardChunk<T> Chunk;
  constexpr int C = Chunk::C;
  constexpr int64_t kPitch = Chunk::kPitch;
  for (int t = 0; t < C; t += 4)
    for (int s = 0; s <= t; s += 4) {
      T products[16];
      dots<4, 4>(values, kPitch, c.grad_y.row[t], c.v.row[s], products);
      for (int a = 0; a < 4; a++) memcpy(&c.M[t + a][s], products + 4 * a, sizeof(T) * 4);
    }
  backward_diagonal(keys, c);
  if (tokens < C) backward_start_short(keys, c);
  backward_level<1>(keys, tokens, c);
  backward_level<2>(keys, tokens, c);
  backward_level<4>(keys, tokens, c);
  backward_level<8>(keys, tokens, c);
  static_assert(C == 16);

  for (int64_t j = 0; j < values; j += V::W)  // grad_v, from the targets within the chunk
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
  if (there) {
    transpose(values, keys, G, G_rows);
    multiply<C, true>(keys, values, kPitch, c.K.row[0], G_rows, c.grad_v.row[0], fetch);
  }

  multiply<C, false>(values, keys, kPitch, c.grad_y.row[0], S, c.sums.row[0], fetch);
  for (int64_t i = 0; i < keys; i += V::W) {  // from the state as a source
    V through[4];  // sum_j S G: the path of this pair crosses every token
    for (V& x : through) x = V(T(0));
    for (int64_t j = 0; j < values; j += 4)
      RWKV6_UNROLLED (int a = 0; a < 4; a++)
        if (j + a < values)
          through[a] =
              fma(V::load(S + (j + a) * keys + i), V::load(G + (j + a) * keys + i), through[a]);
    const V sum = through[0] + through[1] + (through[2] + through[3]);
    V later = there ? sum * V::load(c.all.row[0] + i) : V(T(0));
    for (int t = C - 1; t >= 0; t--) {
      const V sum = V::load(c.sums.row[t] + i);
      fma(V::load(c.F.row[t] + i), sum, V::load(c.grad_r.row[t] + i)).store(c.grad_r.row[t] + i);
      (V::load(c.q.row[t] + i) + later).store(c.q.row[t] + i);
      later = fma(V::load(c.R.row[t] + i), sum, later);
    }
  }
  if (!there) {  // a factor of G that is no number must not make its zeros none
    for (int t = 0; t < C; t++) {
      memset(c.v.row[t], 0, sizeof(T) * size_t(values));
      memset(c.K.row[t], 0, sizeof(T) * size_t(keys));
      memset(c.G.row[t], 0, sizeof(T) * size_t(keys));
    }
    for (T* row : {c.decay, c.decay_low, c.q.row[tokens - 1]})
      memset(row, 0, sizeof(T) * size_t(keys));
  }
  multiply<C, false>(values, keys, kPitch, c.v.row[0], G, c.sums.row[0], fetch);
  for (int64_t i = 0; i < keys; i += V::W) {  // to the gradient of the state as a target
    V earlier(T(0));
    for (int t = 0; t < C; t++) {
      const V sum = V::load(c.sums.row[t] + i);
      fma(V::load(c.G.row[t] + i), sum, V::load(c.grad_k.row[t] + i)).store(c.grad_k.row[t] + i);
      const V q = V::load(c.q.row[t] + i) + earlier;
      (V(T(0)) - V::load(c.rate.row[t] + i) * q).store(c.q.row[t] + i);
      earlier = fma(V::load(c.K.row[t] + i), sum, earlier);
    }
  }
  update<C>(values, keys, kPitch, c.decay, c.decay_low, c.grad_y.row[0], c.R.row[0], G, G, fetch);
}

// What one thread works with.
template <class T>
struct BackwardScratch {
  BackwardChunk<T> chunk;
  Fetch fetch;
  alignas(64) T row[kMaxHeadSize];  // on its way past the caches
  T* G_rows;                        // [keys, values]
  T* G;                             // [heads, values, keys]
  T* walking;                       // [heads, values, keys]: the state between checkpoints
  T* states;       // [kBackwardHeads, kSegment / C, values, keys]: before the chunks of a segment
  T* checkpoints;  // [heads, segments, values, keys]: before each segment
};

// One sequence, heads [first, last), the values of one part.
template <class T, class Length>
struct BackwardWalk {
  static constexpr int C = BackwardChunk<T>::C;
  static constexpr int64_t kChunks = kSegment / C;
  const BackwardJob& job;
  const int64_t index, first, last, part_index;
  const Columns part;
  const Length keys, values;
  const bool streamed;  // gradients go past the caches
  BackwardScratch<T>& scratch;
  const Sequence& sequence = job.sequences[index];
  const int64_t chunks = (sequence.length + C - 1) / C;
  const int64_t segments = (chunks + kChunks - 1) / kChunks;

  T* G(int64_t h) const { return scratch.G + (h - first) * values * keys; }
  // The state before a chunk: a checkpoint, or a state of the segment in turn.
  T* state(int64_t h, int64_t chunk) const {
    const int64_t segment = chunk / kChunks, n = chunk % kChunks;
    if (n == 0) return scratch.checkpoints + ((h - first) * segments + segment) * values * keys;
    return scratch.states + ((h - first) % kBackwardHeads * kChunks + n) * values * keys;
  }
  T* grad_u(int64_t h) const {
    return static_cast<T*>(job.grad_u) + ((index * job.parts + part_index) * job.H + h) * job.N;
  }
  int64_t tokens(int64_t chunk) const {
    return sequence.length - chunk * C < C ? sequence.length - chunk * C : C;
  }
  char* row(const Tokens& x, int64_t h, int64_t chunk) const {
    return x.row(sequence.b, sequence.begin + chunk * C, h);
  }

  // Where the length is fixed there is one part, and no padding.
  int64_t width(Columns columns) const {
    return std::is_same_v<Length, int64_t> ? columns.last - columns.first : int64_t(keys);
  }

  // The chunk's rows in the accumulator's dtype, zeros behind its last token.
  void load(const Tokens& x, int64_t h, int64_t chunk, Columns columns,
            typename BackwardChunk<T>::Rows& rows) const {
    const char* from = row(x, h, chunk);
    if (from) from += columns.first * size_of(x.dtype);
    const int64_t there = tokens(chunk);
    for (int64_t t = 0; t < C; t++) {
      load_row(t < there ? from : nullptr, x.dtype, width(columns), rows.row[t]);
      if (from) from += x.distance(1, 0);
    }
  }

  void store(const typename BackwardChunk<T>::Rows& rows, const Tokens& x, int64_t h, int64_t chunk,
             Columns columns, int64_t offset) const {
    char* to = row(x, h, chunk) + (columns.first + offset) * size_of(x.dtype);
    for (int64_t t = 0; t < tokens(chunk); t++, to += x.distance(1, 0)) {
      if (!streamed) {
        store_row(rows.row[t], width(columns), x.dtype, to);
        continue;
      }
      store_row(rows.row[t], width(columns), x.dtype, scratch.row);
      stream_lines(scratch.row, width(columns) * size_of(x.dtype), to);
    }
  }

  // The rows of the head that has its turn next will be wanted: of [from, to), else of the first
  // one's `next_chunk`.
  void want(std::initializer_list<const Tokens*> tensors, int64_t h, int64_t chunk, int64_t from,
            int64_t to, int64_t next_chunk) const {
    scratch.fetch.clear();
    const bool turn = h + 1 < to;
    for (const Tokens* x : tensors)
      scratch.fetch.want(*x, row(*x, turn ? h + 1 : from, turn ? chunk : next_chunk), C, job.N);
  }

  // The state from before to behind a chunk.
  void walk_there(int64_t h, int64_t chunk, const T* S, T* to) const {
    typedef Vec<T> V;
    BackwardChunk<T>& c = scratch.chunk;
    load(job.w, h, chunk, {0, job.N}, c.all);
    load(job.k, h, chunk, {0, job.N}, c.K);
    load(job.v, h, chunk, part, c.v);
    backward_decays(keys, tokens(chunk), c);
    for (int64_t i = 0; i < keys; i += V::W) {
      V all(T(1));
      for (int t = C - 1; t >= 0; t--) {
        (V::load(c.K.row[t] + i) * all).store(c.K.row[t] + i);
        all = all * V::load(c.all.row[t] + i);
      }
    }
    update<C>(values, keys, c.kPitch, c.decay, c.decay_low, c.v.row[0], c.K.row[0], S, to,
              scratch.fetch);
  }

  void walk_back(int64_t h, int64_t chunk) const {
    BackwardChunk<T>& c = scratch.chunk;
    const Columns all = {0, job.N};
    const bool from_y = job.grad_y.data;  // y's terms, otherwise, are absent: r and u play no part
    load(from_y ? job.r : job.grad_y, h, chunk, all, c.R);
    load(job.k, h, chunk, all, c.K);
    load(job.w, h, chunk, all, c.all);
    load(job.v, h, chunk, part, c.v);
    load(job.grad_y, h, chunk, part, c.grad_y);
    load_row(from_y ? job.u.row(h) : nullptr, job.u.dtype, job.N, c.u);
    load_row(grad_u(h), DTypeOf<T>::value, job.N, c.grad_u);
    backward_decays(keys, tokens(chunk), c);
    const bool there = job.grad_final.data || chunk + 1 < chunks;
    backward_chunk(keys, values, tokens(chunk), there, c, state(h, chunk), G(h), scratch.G_rows,
                   scratch.fetch);
    if (!from_y) memset(&c.grad_r, 0, sizeof c.grad_r);
    const int64_t offset = part_index * job.part_stride;
    store(c.grad_r, job.grad_r, h, chunk, all, offset);
    store(c.grad_k, job.grad_k, h, chunk, all, offset);
    store(c.q, job.grad_w, h, chunk, all, offset);
    store(c.grad_v, job.grad_v, h, chunk, part, 0);
    if (from_y) memcpy(grad_u(h), c.grad_u, sizeof(T) * size_t(job.N));
  }

  // The part's columns of a [key][value] matrix, transposed: out [values, keys].
  void load_state(const char* matrix, const States& states, T* out) const {
    T* rows = scratch.G_rows;
    memset(rows, 0, sizeof(T) * size_t(keys * values));
    for (int64_t i = 0; matrix && i < job.N; i++)
      load_row(matrix + (i * states.stride_row + part.first) * size_of(states.dtype), states.dtype,
               part.last - part.first, rows + i * values);
    transpose(keys, values, rows, out);
  }

  void store_state(const T* transposed, const States& states, char* matrix) const {
    T* rows = scratch.G_rows;
    transpose(values, keys, transposed, rows);
    for (int64_t i = 0; i < job.N; i++)
      store_row(rows + i * values, part.last - part.first, states.dtype,
                matrix + (i * states.stride_row + part.first) * size_of(states.dtype));
  }

  void run() const {
    for (int64_t h = first; h < last; h++) {
      load_state(sequence.initial < 0 ? nullptr : job.initial.matrix(sequence.initial, h),
                 job.initial, state(h, 0));
      load_state(job.grad_final.matrix(index, h), job.grad_final, G(h));
      memset(grad_u(h), 0, sizeof(T) * size_t(job.N));
    }
    // the last segment needs no checkpoint behind it
    for (int64_t n = 0; n < (segments - 1) * kChunks; n++)
      for (int64_t h = first; h < last; h++) {
        want({&job.w, &job.k, &job.v}, h, n, first, last, n + 1);
        T* between = scratch.walking + (h - first) * values * keys;
        walk_there(h, n, n % kChunks ? between : state(h, n),
                   (n + 1) % kChunks ? between : state(h, n + 1));
      }
    for (int64_t s = segments - 1; s >= 0; s--) {
      const int64_t begin = s * kChunks, end = begin + kChunks < chunks ? begin + kChunks : chunks;
      for (int64_t from = first; from < last; from += kBackwardHeads) {
        const int64_t to = from + kBackwardHeads < last ? from + kBackwardHeads : last;
        for (int64_t n = begin; n + 1 < end; n++)
          for (int64_t h = from; h < to; h++) {
            want({&job.w, &job.k, &job.v}, h, n, from, to, n + 1);
            walk_there(h, n, state(h, n), state(h, n + 1));
          }
        for (int64_t n = end - 1; n >= begin; n--)
          for (int64_t h = from; h < to; h++) {
            if (streamed)
              want({&job.r, &job.k, &job.v, &job.w, &job.grad_y}, h, n, from, to, n - 1);
            else
              want({&job.r, &job.k, &job.v, &job.w, &job.grad_y, &job.grad_r, &job.grad_k,
                    &job.grad_v, &job.grad_w},
                   h, n, from, to, n - 1);
            walk_back(h, n);
          }
      }
    }
    for (int64_t h = first; h < last && job.grad_initial.data; h++)
      store_state(G(h), job.grad_initial, job.grad_initial.matrix(index, h));
  }
};

// Whether the gradients are large enough to go past the caches, and in whole lines.
inline bool is_streamed(const BackwardJob& job) {
  int64_t tokens = 0, bytes = 0;
  for (int64_t s = 0; s < job.num_sequences; s++) tokens += job.sequences[s].length;
  bool lines = job.parts == 1;
  for (const Tokens* x : {&job.grad_r, &job.grad_k, &job.grad_v, &job.grad_w}) {
    const int64_t size = size_of(x->dtype);
    bytes += tokens * job.H * job.N * size;
    const int64_t distances = x->stride_b | x->stride_t | x->stride_h | job.N;
    lines = lines && reinterpret_cast<uintptr_t>(x->data) % 64 == 0 && distances * size % 64 == 0;
  }
  return lines && bytes >= kStreamed;
}

template <class T, class Length>
void backward_units(const BackwardJob& job, int64_t begin, int64_t end, Length keys) {
  const FlushDenormals flush;
  const int64_t units_per_sequence = job.H * job.parts;
  int64_t longest = 1;
  for (int64_t s = begin / units_per_sequence; s <= (end - 1) / units_per_sequence; s++)
    longest = job.sequences[s].length > longest ? job.sequences[s].length : longest;
  const int64_t segments = (longest + kSegment - 1) / kSegment, matrix = keys * keys;
  const int64_t affordable = kCheckpoints / (segments * matrix * int64_t(sizeof(T)));
  int64_t heads = affordable < kBackwardHeads ? kBackwardHeads : affordable;
  heads = heads < kHeadGroup ? heads : kHeadGroup;
  heads = heads < end - begin ? heads : end - begin;
  const int64_t states = kBackwardHeads * kSegment / kBackwardChunk;
  const bool streamed = is_streamed(job);
  const std::unique_ptr<BackwardScratch<T>> scratch(new BackwardScratch<T>);
  Scratch<T> memory((1 + 2 * heads + states + heads * segments) * Scratch<T>::aligned(matrix));
  scratch->G_rows = memory.take(matrix);
  scratch->G = memory.take(heads * matrix);
  scratch->walking = memory.take(heads * matrix);
  scratch->states = memory.take(states * matrix);
  scratch->checkpoints = memory.take(heads * segments * matrix);
  while (begin < end) {
    const int64_t index = begin / units_per_sequence, unit = begin % units_per_sequence;
    const int64_t h = unit / job.parts, part = unit % job.parts;
    int64_t count = 1;
    if (job.parts == 1) {
      count = job.H - h < heads ? job.H - h : heads;
      count = end - begin < count ? end - begin : count;
    }
    const Columns columns = columns_of(part, job.parts, job.N, Vec<T>::W);
    const Length values(padded<T>(columns.last - columns.first));
    BackwardWalk<T, Length>{job,     index, h,      h + count, part,
                            columns, keys,  values, streamed,  *scratch}
        .run();
    begin += count;
  }
  if (streamed) finish_streams();
}

// A length that the compiler knows; constructed like one that it does not.
template <int64_t N>
struct Fixed : std::integral_constant<int64_t, N> {
  explicit Fixed(int64_t) {}
};

template <class T>
void backward(const BackwardJob& job, int64_t begin, int64_t end) {
  if (begin == end) return;
  if constexpr (sizeof(T) == 4) {
    if (job.parts == 1) switch (job.N) {
        case 32: return backward_units<T>(job, begin, end, Fixed<32>(32));
        case 64: return backward_units<T>(job, begin, end, Fixed<64>(64));
        case 128: return backward_units<T>(job, begin, end, Fixed<128>(128));
      }
  }
  backward_units<T>(job, begin, end, padded<T>(job.N));
}
