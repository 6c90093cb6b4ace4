// WKV6 forward, in chunks of C tokens.
//
// A chunk that starts from the state S, with the decays d_0 ... d_{C-1} of its tokens, is
//   y_t[j]  = sum_i R_t[i] S[i][j] + sum_{s <= t} A[t][s] v_s[j]       R_t = r_t d_0 ... d_{t-1}
//   S[i][j] = d_0[i] ... d_{C-1}[i] S[i][j] + sum_t K_t[i] v_t[j]      K_t = k_t d_{t+1} ...
//   d_{C-1} A[t][s] = sum_i r_t[i] d_{t-1}[i] ... d_{s+1}[i] k_s[i],   A[t][t] = sum_i r_t[i] u[i]
//   k_t[i]
// The state is met once a chunk, which takes (2 + 1 / C) N^2 multiply-adds per token where the
// recurrence takes 3 N^2. Decays only ever enter as products of numbers in [0, 1]: nothing can
// overflow, nothing is divided and nothing cancels.
//
// The state lives in the output itself (final_state, or the caller's state). A chunk of one token
// is the recurrence: decode, and what is left over at the end of a sequence.
// Included by isa.inc inside the namespace of one instruction set.

constexpr int64_t kChunk = 4;       // tokens, measured best on every instruction set
constexpr int64_t kBlock = 8;       // tokens of a head before the next head's turn
constexpr int64_t kHeadGroup = 32;  // heads that take turns: the rows of a token are neighbours

// One chunk of one head, for the columns of one part.
template <class T>
struct ForwardChunk {
  // between rows: known to the compiler, and no power of two, which the first-level cache dislikes
  static constexpr int64_t kPitch = kMaxHeadSize + 64 / sizeof(T);
  struct Rows {
    alignas(64) T row[kChunk][kPitch];
  };
  int64_t h, step, tokens;  // head, first token, number of tokens: kChunk or 1
  // [C, N], v and y [C, columns of the part], in the tensors' dtype: rows of the tensors
  // themselves, where these are whole vectors, or else of padded copies
  const void *r[kChunk], *k[kChunk], *v[kChunk];
  void* y[kChunk];
  const T* w[kChunk];  // [C, N], converted
  Rows r_copy, k_copy, v_copy, w_copy, y_copy;
  Rows R, K;                               // [C, N]
  alignas(64) T u[kPitch], decay[kPitch];  // [N], the decay of the whole chunk
  alignas(64) T A[32];                     // A[t][s] at pair(t, s)

  static constexpr int pair(int t, int s) { return t * (t + 1) / 2 + s; }
};

// Where a head's state comes from and goes to, at the part's first column. Both may be the same
// memory.
template <class T>
struct StateMove {
  const T* from;
  int64_t from_stride;
  T* to;
  int64_t to_stride;
};

// R, K, A and the decay of the whole chunk.
template <class T, class X, int C>
RWKV6_INLINE void weigh(int64_t N, ForwardChunk<T>& chunk) {
  typedef Vec<T> V;
  typedef ForwardChunk<T> Chunk;
  V A[Chunk::pair(C, 0)];
  for (V& a : A) a = V(T(0));
  if (C == 1) decay_row(chunk.w[0], N, chunk.decay);
  for (int64_t i = 0; i < N; i += V::W) {
    V r[C], w[C], rate[C], d[C];
    RWKV6_UNROLLED (int t = 0; t < C; t++) w[t] = V::load(chunk.w[t] + i);
    if constexpr (C == 1)
      d[0] = V::load(chunk.decay + i);
    else
      decay_lanes(w, rate, d);
    RWKV6_UNROLLED (int t = 0; t < C; t++) r[t] = load_as<T>(static_cast<const X*>(chunk.r[t]) + i);
    RWKV6_UNROLLED (int s = 0; s < C; s++) {
      V k = load_as<T>(static_cast<const X*>(chunk.k[s]) + i);
      A[Chunk::pair(s, s)] = fma(r[s], V::load(chunk.u + i) * k, A[Chunk::pair(s, s)]);
      RWKV6_UNROLLED (int t = s + 1; t < C; t++) {
        A[Chunk::pair(t, s)] = fma(r[t], k, A[Chunk::pair(t, s)]);
        k = k * d[t];
      }
      k.store(chunk.K.row[s] + i);
    }
    V all = d[0];
    r[0].store(chunk.R.row[0] + i);
    RWKV6_UNROLLED (int t = 1; t < C; t++) {
      (r[t] * all).store(chunk.R.row[t] + i);
      all = all * d[t];
    }
    all.store(chunk.decay + i);
  }
  store_sums<Chunk::pair(C, 0)>(A, chunk.A);
}

// Q vectors of columns of y and of the state through the chunk. Partial: of the one vector only
// the first `columns` are there.
template <class T, class X, int C, int Q, bool Partial>
RWKV6_INLINE void forward_tile(ForwardChunk<T>& chunk, int64_t N, int64_t j,
                               const StateMove<T>& state, int64_t columns, Fetch& fetch) {
  typedef Vec<T> V;
  V v[C][Q], y[C][Q];
  RWKV6_UNROLLED (int t = 0; t < C; t++) {
    RWKV6_UNROLLED (int q = 0; q < Q; q++) {
      v[t][q] = load_as<T>(static_cast<const X*>(chunk.v[t]) + j + q * V::W);
      y[t][q] = V(chunk.A[chunk.pair(t, 0)]) * v[0][q];
    }
    RWKV6_UNROLLED (int s = 1; s <= t; s++) {
      const V a(chunk.A[chunk.pair(t, s)]);
      RWKV6_UNROLLED (int q = 0; q < Q; q++) y[t][q] = fma(a, v[s][q], y[t][q]);
    }
  }
  const T* from = state.from + j;
  T* to = state.to + j;
  for (int64_t i = 0; i < N; i++) {
    const V decay(chunk.decay[i]);
    V S[Q], next[Q];
    RWKV6_UNROLLED (int q = 0; q < Q; q++) {
      S[q] = Partial ? V::load_first(from, columns) : V::load(from + q * V::W);
      next[q] = decay * S[q];
    }
    RWKV6_UNROLLED (int t = 0; t < C; t++) {
      const V r(chunk.R.row[t][i]), k(chunk.K.row[t][i]);
      RWKV6_UNROLLED (int q = 0; q < Q; q++) {
        y[t][q] = fma(r, S[q], y[t][q]);
        next[q] = fma(k, v[t][q], next[q]);
      }
    }
    RWKV6_UNROLLED (int q = 0; q < Q; q++)
      Partial ? next[q].store_first(to, columns) : next[q].store(to + q * V::W);
    if constexpr (C == 1)  // the state itself is what there is to read
      RWKV6_UNROLLED (int q = 0; q < Q; q++)
        __builtin_prefetch(from + 16 * state.from_stride + q * V::W);
    else
      fetch.line();
    from += state.from_stride, to += state.to_stride;
  }
  RWKV6_UNROLLED (int t = 0; t < C; t++)
    RWKV6_UNROLLED (int q = 0; q < Q; q++)
      store_as(y[t][q], static_cast<X*>(chunk.y[t]) + j + q * V::W);
}

// One head's y and state through the chunk.
template <class T, class X, int C>
void forward_tiles(ForwardChunk<T>& chunk, int64_t N, int64_t columns, const StateMove<T>& state,
                   Fetch& fetch) {
  typedef Vec<T> V;
  constexpr int Q = C == 1 ? 4 : RWKV6_TILE_VECTORS;
  int64_t j = 0;
  for (; j + Q * V::W <= columns; j += Q * V::W)
    forward_tile<T, X, C, Q, false>(chunk, N, j, state, 0, fetch);
  for (; j + V::W <= columns; j += V::W)
    forward_tile<T, X, C, 1, false>(chunk, N, j, state, 0, fetch);
  if (j < columns) forward_tile<T, X, C, 1, true>(chunk, N, j, state, columns - j, fetch);
}

// Finds the rows of the chunk's C tokens; those to be wanted next are `next_t`
// tokens and `next_h` heads from here.
template <class T, int C>
RWKV6_INLINE void unpack(const ForwardJob& job, const Sequence& sequence, Columns part,
                         int64_t next_t, int64_t next_h, ForwardChunk<T>& chunk, Fetch& fetch) {
  const int64_t token = sequence.begin + chunk.step, h = chunk.h;
  const int64_t N = job.N, columns = part.last - part.first, size = size_of(job.r.dtype);
  const auto row_of = [&](const Tokens& x, int64_t first) {
    char* row = x.row(sequence.b, token, h);
    return row ? row + first * size_of(x.dtype) : nullptr;
  };
  const auto want = [&](const Tokens& x, const char* row, int64_t n) {
    if (C > 1) fetch.want(x, row ? row + x.distance(next_t, next_h) : nullptr, C, n);
  };
  const auto find = [&](const Tokens& x, int64_t first, int64_t n, auto& copy, auto& found) {
    const char* row = row_of(x, first);
    want(x, row, n);
    for (int t = 0; t < C; t++) {
      found[t] = row;
      if (!row || n % Vec<T>::W) {
        memset(copy.row[t], 0, size_t(padded<T>(n) * size));
        if (row) memcpy(copy.row[t], row, size_t(n * size));
        found[t] = copy.row[t];
      }
      if (row) row += x.distance(1, 0);
    }
  };
  find(job.r, 0, N, chunk.r_copy, chunk.r);
  find(job.k, 0, N, chunk.k_copy, chunk.k);
  find(job.v, part.first, columns, chunk.v_copy, chunk.v);
  const char* w = row_of(job.w, 0);
  want(job.w, w, N);
  for (int t = 0; t < C; t++, w += job.w.distance(1, 0)) {
    chunk.w[t] = reinterpret_cast<const T*>(w);
    if (size_of(job.w.dtype) == sizeof(T) && N % Vec<T>::W == 0) continue;
    load_row(w, job.w.dtype, N, chunk.w_copy.row[t]);
    chunk.w[t] = chunk.w_copy.row[t];
  }
  char* y = row_of(job.y, part.first);
  if (C > 1) fetch.want(job.y, y, C, columns);
  for (int t = 0; t < C; t++, y += job.y.distance(1, 0))
    chunk.y[t] = columns % Vec<T>::W == 0 ? y : static_cast<void*>(chunk.y_copy.row[t]);
}

// Moves to y what could not be written there at once.
template <class T>
void pack(const ForwardJob& job, const Sequence& sequence, Columns part,
          const ForwardChunk<T>& chunk) {
  const int64_t n = part.last - part.first, size = size_of(job.y.dtype);
  if (n % Vec<T>::W == 0) return;
  for (int64_t t = 0; t < chunk.tokens; t++) {
    char* y = job.y.row(sequence.b, sequence.begin + chunk.step + t, chunk.h);
    memcpy(y + part.first * size, chunk.y[t], size_t(n * size));
  }
}

// Points state.from at the head's initial state, where the first chunk can read it; otherwise that
// is put into state.to.
template <class T>
void start(const ForwardJob& job, const Sequence& sequence, int64_t h, Columns part,
           StateMove<T>& state) {
  const char* initial = sequence.initial < 0 ? nullptr : job.initial.matrix(sequence.initial, h);
  if (initial && size_of(job.initial.dtype) == sizeof(T) && sequence.length) {
    state.from = reinterpret_cast<const T*>(initial) + part.first;
    state.from_stride = job.initial.stride_row;
    return;
  }
  const int64_t columns = part.last - part.first;
  for (int64_t i = 0; i < job.N; i++) {
    const int64_t offset = i * job.initial.stride_row + part.first;
    T row[kMaxHeadSize + Vec<T>::W];
    load_row(initial ? initial + offset * size_of(job.initial.dtype) : nullptr, job.initial.dtype,
             columns, row);
    memcpy(state.to + i * state.to_stride, row, size_t(columns) * sizeof(T));
  }
}

// The way through one sequence, heads [first, last) and the columns of one part: block after block,
// the heads in turn, chunk after chunk. X is the dtype of the inputs.
template <class T, class X>
struct ForwardWalk {
  const ForwardJob& job;
  const Sequence& sequence;
  const int64_t first, last;
  const Columns part;
  int64_t block = 0, h = first, step = 0;  // the next chunk to unpack
  Fetch fetch = {};

  int64_t block_end() const {
    return sequence.length - block < kBlock ? sequence.length : block + kBlock;
  }

  bool done() const { return block >= sequence.length; }

  void unpack_next(ForwardChunk<T>& chunk) {
    const bool turn = h + 1 < last;  // the next head's, or the first one's with the next block
    chunk.h = h, chunk.step = step;
    fetch.clear();
    chunk.tokens = step + kChunk <= block_end() ? kChunk : 1;
    load_row(job.u.row(h), job.u.dtype, job.N, chunk.u);
    const int64_t next_t = turn ? 0 : kBlock;
    const int64_t next_h = turn ? 1 : first - h;
    if (chunk.tokens == kChunk) {
      unpack<T, kChunk>(job, sequence, part, next_t, next_h, chunk, fetch);
      weigh<T, X, kChunk>(job.N, chunk);
    } else {
      unpack<T, 1>(job, sequence, part, next_t, next_h, chunk, fetch);
      weigh<T, X, 1>(job.N, chunk);
    }
    step += chunk.tokens;
    if (step < block_end()) return;
    if (++h == last) h = first, block += kBlock;
    step = block;
  }

  void compute(ForwardChunk<T>& chunk) {
    StateMove<T> state = state_of(chunk.h);
    if (chunk.step == 0) start(job, sequence, chunk.h, part, state);
    if (chunk.tokens == kChunk)
      forward_tiles<T, X, kChunk>(chunk, job.N, part.last - part.first, state, fetch);
    else
      forward_tiles<T, X, 1>(chunk, job.N, part.last - part.first, state, fetch);
    pack(job, sequence, part, chunk);
  }

  StateMove<T> state_of(int64_t head) const {
    StateMove<T> state;
    state.to = reinterpret_cast<T*>(job.final.matrix(sequence.final, head)) + part.first;
    state.to_stride = job.final.stride_row;
    state.from = state.to, state.from_stride = state.to_stride;
    return state;
  }
};

template <class T, class X>
void forward_heads(const ForwardJob& job, const Sequence& sequence, int64_t first, int64_t last,
                   Columns part, ForwardChunk<T> (&chunks)[2]) {
  const int64_t columns = part.last - part.first, L = sequence.length;
  if (sequence.final < 0) {  // a padding row
    for (int64_t t = 0; t < L; t++)
      for (int64_t h = first; h < last; h++) {
        char* y = job.y.row(sequence.b, sequence.begin + t, h);
        memset(y + part.first * size_of(job.y.dtype), 0, size_t(columns * size_of(job.y.dtype)));
      }
    return;
  }
  ForwardWalk<T, X> walk{job, sequence, first, last, part};
  if (L == 0) {
    for (int64_t h = first; h < last; h++) {
      StateMove<T> state = walk.state_of(h);
      start(job, sequence, h, part, state);
    }
    return;
  }
  // Unpacking is one chunk ahead: its chains of dependent instructions run in the shadow of the
  // tiles of the chunk before.
  walk.unpack_next(chunks[0]);
  int n = 0;
  for (; !walk.done(); n ^= 1) {
    walk.unpack_next(chunks[n ^ 1]);
    walk.compute(chunks[n]);
  }
  walk.compute(chunks[n]);
}

template <class T, class X>
void forward_units(const ForwardJob& job, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const int64_t N = job.N, units_per_sequence = job.H * job.parts;
  // On the stack (62 KiB of f32, 124 of f64), so that a call that updates a state in place cannot
  // fail half-way for want of memory.
  ForwardChunk<T> chunks[2];
  while (begin < end) {
    const Sequence& sequence = job.sequences[begin / units_per_sequence];
    const int64_t h = begin % units_per_sequence / job.parts, part = begin % job.parts;
    int64_t heads = 1;
    if (job.parts == 1) {
      heads = job.H - h < kHeadGroup ? job.H - h : kHeadGroup;
      heads = end - begin < heads ? end - begin : heads;
    }
    const Columns columns = columns_of(part, job.parts, N, Vec<T>::W);
    forward_heads<T, X>(job, sequence, h, h + heads, columns, chunks);
    begin += heads;
  }
}

inline void forward(const ForwardJob& job, int64_t begin, int64_t end) {
  if (job.r.dtype == DType::f64)
    forward_units<double, double>(job, begin, end);
  else if (job.r.dtype == DType::f32)
    forward_units<float, float>(job, begin, end);
  else if (job.r.dtype == DType::bf16)
    forward_units<float, BF16>(job, begin, end);
  else
    forward_units<float, F16>(job, begin, end);
}
