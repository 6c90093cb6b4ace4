// WKV6 forward, in chunks of C tokens.
//
// Let S be the state before a chunk and d_0 ... d_{C-1} the decays of its tokens. With
//
//   R_t[i]  = r_t[i] d_0[i] ... d_{t-1}[i]
//   K_t[i]  = k_t[i] d_{t+1}[i] ... d_{C-1}[i]
//   A[t][s] = sum_i r_t[i] d_{s+1}[i] ... d_{t-1}[i] k_s[i]      for s < t
//   A[t][t] = sum_i r_t[i] u[i] k_t[i]
//
// the outputs of the chunk and the state after it are
//
//   y_t[j]  = sum_i R_t[i] S[i][j] + sum_{s <= t} A[t][s] v_s[j]
//   S[i][j] = d_0[i] ... d_{C-1}[i] S[i][j] + sum_t K_t[i] v_t[j]
//
// Each element of the state is read and written once per chunk. That takes (2 + 1 / C) N^2
// multiply-adds per token, where the recurrence takes 3 N^2. Decays only enter as products of
// numbers in [0, 1]: nothing can overflow, there is no division and no cancellation. What a
// product of decays near 1 loses by its rounding is carried along (ForwardScratch::residuals).
//
// The state is kept in the output itself (final_state, or the caller's state). A chunk of one token
// is the recurrence: it serves decoding and the tokens left over at the end of a sequence.
//
// Where only the final state is wanted (without y: WithY is false), r and u, R and A, and the first
// of the two products with the state are left out. What is left is computed as with y, to the same
// bits, from rows that are converted to the accumulator's dtype first: X is T.
//
// Included by isa.inc inside the namespace of one instruction set.

// The order of a group of heads: a block of tokens of the first head, the same tokens of the second
// and so on, then the next block. For one token, the rows of all heads are neighbours in memory.
constexpr int64_t kChunk = 4;  // tokens, measured best on every instruction set
// Tokens of one head before the next head's. The smaller a head, the more of its time is the wait for
// its rows.
constexpr int64_t block_tokens(int64_t N) { return N > 32 ? 8 : 32; }
constexpr int64_t kHeadGroup = 32;  // heads
// States of up to kCopiedState values are copied to memory of the thread's own while it works on
// them (see SequenceForward::copies), for sequences of kCopiedTokens and more.
constexpr int64_t kCopiedState = 64 * 64;
constexpr int64_t kCopiedTokens = 64;

// One chunk of one head, for the columns of one part.
template <class T>
struct ForwardChunk {
  // From row to row. Known to the compiler; not a power of two, since rows that far apart would
  // fall into the same sets of the first-level cache.
  static constexpr int64_t kPitch = kMaxHeadSize + 64 / sizeof(T);
  struct Rows {
    alignas(64) T row[kChunk][kPitch];
  };
  int64_t h, step, tokens;  // head, first token, number of tokens: kChunk or 1
  bool settles;             // whether decay_low is applied: see ForwardScratch::residuals
  // The rows of the tokens in the tensors' dtype: r and k [C, N], v and y [C, columns of the part].
  // They are the tensors' own memory where a row is a number of whole vectors, otherwise padded
  // copies. Without y, k and v are converted as w is.
  const void *r[kChunk], *k[kChunk], *v[kChunk];
  void* y[kChunk];
  const T* w[kChunk];  // [C, N], converted
  Rows r_copy, k_copy, v_copy, w_copy, y_copy;
  Rows R, K;                    // [C, N]
  alignas(64) T decay[kPitch];  // [N], of the whole chunk
  alignas(64) T A[32];          // A[t][s] at pair(t, s)
  // [N], what `decay` lost by rounding: decay_rest for a chunk of one token, otherwise the head's
  // residuals.
  const T* decay_low;
  alignas(64) T decay_rest[kPitch];

  static constexpr int pair(int t, int s) { return t * (t + 1) / 2 + s; }
};

// Where a chunk reads its head's state and where it writes it, from the part's first column on.
// Both may be the same memory.
template <class T>
struct StateMove {
  const T* from;
  int64_t from_stride;
  T* to;
  int64_t to_stride;
};

// Written without a loop, because the compiler turns a loop into a slow memset.
template <class V, int... i>
RWKV6_INLINE void zero(V* v, std::integer_sequence<int, i...>) {
  ((v[i] = V(0)), ...);
}

// Computes R, K, A and the decay of the whole chunk (K and the decay without y): all that does not
// depend on the state. u [N] is the head's. residual [N] is what the decays of the head's earlier
// chunks lost by rounding, relative to their product; it is added to this chunk's decay before that
// is rounded.
template <class T, class X, bool WithY, int C>
RWKV6_INLINE void intra_chunk(int64_t N, const T* u, T* residual, ForwardChunk<T>& chunk) {
  typedef Vec<T> V;
  typedef ForwardChunk<T> Chunk;
  V A[Chunk::pair(C, 0)];
  zero(A, std::make_integer_sequence<int, Chunk::pair(C, 0)>());
  if (C == 1) decay_row<T>(chunk.w[0], N, chunk.decay, nullptr, chunk.decay_rest);
  for (int64_t i = 0; i < N; i += V::W) {
    V r[C], w[C], rate[C], d[C], c[C];
    RWKV6_UNROLLED (int t = 0; t < C; t++) w[t] = V::load(chunk.w[t] + i);
    if constexpr (C == 1)
      d[0] = V::load(chunk.decay + i), c[0] = V::load(chunk.decay_rest + i);
    else
      decay_lanes(w, rate, d, c);
    V all = d[0], change = c[0];
    if constexpr (WithY) {
      RWKV6_UNROLLED (int t = 0; t < C; t++)
        r[t] = load_as<T>(static_cast<const X*>(chunk.r[t]) + i);
      r[0].store(chunk.R.row[0] + i);
    }
    RWKV6_UNROLLED (int t = 1; t < C; t++) {
      if constexpr (WithY) (r[t] * all).store(chunk.R.row[t] + i);
      change = fma(all, c[t], change);
      all = all * d[t];
    }
    V low = V::load(residual + i);
    split_decay(all, change, all, low);
    all.store(chunk.decay + i);
    if (C == 1) low.store(chunk.decay_rest + i);
    (C == 1 ? V(T(0)) : low).store(residual + i);
    RWKV6_UNROLLED (int s = 0; s < C; s++) {
      V k = load_as<T>(static_cast<const X*>(chunk.k[s]) + i);
      if constexpr (WithY)
        A[Chunk::pair(s, s)] = fma(r[s], V::load(u + i) * k, A[Chunk::pair(s, s)]);
      RWKV6_UNROLLED (int t = s + 1; t < C; t++) {
        if constexpr (WithY) A[Chunk::pair(t, s)] = fma(r[t], k, A[Chunk::pair(t, s)]);
        k = k * d[t];
      }
      k.store(chunk.K.row[s] + i);
    }
  }
  chunk.decay_low = C == 1 ? chunk.decay_rest : residual;
  if constexpr (WithY) store_sums<Chunk::pair(C, 0)>(A, chunk.A);
}

// Computes y and the next state of one chunk, for Q vectors of value columns from column j on. With
// Partial there is one vector, of which only the first `columns` exist. The old state is added to
// the sum last, so that what is added to a state many times as large is rounded only once.
template <class T, class X, bool WithY, int C, bool Settles, int Q, bool Partial>
RWKV6_INLINE void forward_tile(ForwardChunk<T>& chunk, int64_t N, int64_t j,
                               const StateMove<T>& state, int64_t columns, Prefetcher& prefetcher) {
  typedef Vec<T> V;
  V v[C][Q], y[C][Q];
  RWKV6_UNROLLED (int t = 0; t < C; t++) {
    RWKV6_UNROLLED (int q = 0; q < Q; q++) {
      v[t][q] = load_as<T>(static_cast<const X*>(chunk.v[t]) + j + q * V::W);
      if constexpr (WithY) y[t][q] = V(chunk.A[chunk.pair(t, 0)]) * v[0][q];
    }
    RWKV6_UNROLLED (int s = 1; WithY && s <= t; s++) {
      const V a(chunk.A[chunk.pair(t, s)]);
      RWKV6_UNROLLED (int q = 0; q < Q; q++) y[t][q] = fma(a, v[s][q], y[t][q]);
    }
  }
  // Copied to registers, since for all the compiler knows the stores to the state might change
  // them.
  const T* const from = state.from + j;
  T* const to = state.to + j;
  const int64_t from_stride = state.from_stride, to_stride = state.to_stride;
  const T* const decay_low = chunk.decay_low;
  // Row i of the state: [Q] vectors.
  const auto load = [&](int64_t i, V* S) {
    const T* const row = from + i * from_stride;
    RWKV6_UNROLLED (int q = 0; q < Q; q++)
      S[q] = Partial ? V::load_first(row, columns) : V::load(row + q * V::W);
  };
  const auto add_to_y = [&](int64_t i, const V* S) {
    RWKV6_UNROLLED (int t = 0; t < C; t++) {
      const V r(chunk.R.row[t][i]);
      RWKV6_UNROLLED (int q = 0; q < Q; q++) y[t][q] = fma(r, S[q], y[t][q]);
    }
  };
  const auto update = [&](int64_t i, const V* S) {
    V next[Q];
    RWKV6_UNROLLED (int t = 0; t < C; t++) {
      const V k(chunk.K.row[t][i]);
      RWKV6_UNROLLED (int q = 0; q < Q; q++)
        next[q] = t == 0 ? k * v[t][q] : fma(k, v[t][q], next[q]);
    }
    if constexpr (Settles) {
      const V low(decay_low[i]);
      RWKV6_UNROLLED (int q = 0; q < Q; q++) next[q] = fma(low, S[q], next[q]);
    }
    const V decay(chunk.decay[i]);
    T* const row = to + i * to_stride;
    RWKV6_UNROLLED (int q = 0; q < Q; q++) {
      const V S_next = fma(decay, S[q], next[q]);
      Partial ? S_next.store_first(row, columns) : S_next.store(row + q * V::W);
    }
  };
  const auto store_y = [&] {
    RWKV6_UNROLLED (int t = 0; t < C; t++)
      RWKV6_UNROLLED (int q = 0; q < Q; q++)
        store_as(y[t][q], static_cast<X*>(chunk.y[t]) + j + q * V::W);
  };
  // The Prefetcher has a turn a row of every tile. Where a head is a single tile these are all used up
  // by the inputs, and every store would wait for its line.
  if constexpr (WithY && C > 1)
    RWKV6_UNROLLED (int t = 0; t < C; t++)
      RWKV6_UNROLLED (int q = 0; q < Q; q += 64 / (sizeof(X) * V::W))
        __builtin_prefetch(static_cast<X*>(chunk.y[t]) + j + q * V::W, 1);
  V S[Q];
  if constexpr (WithY && C > 1 && RWKV6_TILE_PASSES == 2) {
    // There are far more rows, in all tiles together, than lines to prefetch.
    for (int64_t i = 0; i < N; i++) {
      load(i, S), add_to_y(i, S);
      if (i % 2 == 0) prefetcher.next_line();
    }
    store_y();
    for (int64_t i = 0; i < N; i++) load(i, S), update(i, S);
  } else if constexpr (!WithY && C > 1) {
    // two rows at a time, which share the instructions of a prefetch
    for (int64_t i = 0; i < N; i += 2) {
      load(i, S), update(i, S);
      prefetcher.next_line();
      if (i + 1 < N) load(i + 1, S), update(i + 1, S);
    }
  } else {
    for (int64_t i = 0; i < N; i++) {
      load(i, S);
      if constexpr (WithY) add_to_y(i, S);
      update(i, S);
      if constexpr (C > 1)
        prefetcher.next_line();
      else  // the state itself is what there is to read
        RWKV6_UNROLLED (int64_t at = 0; at < Q * V::W; at += 64 / int64_t(sizeof(T)))
          __builtin_prefetch(from + (i + 16) * from_stride + at);
    }
    if constexpr (WithY) store_y();
  }
}

// Computes y and the next state of one chunk of one head, tile by tile of value columns.
template <class T, class X, bool WithY, int C, bool Settles>
void forward_tiles(ForwardChunk<T>& chunk, int64_t N, int64_t columns, const StateMove<T>& state,
                   Prefetcher& prefetcher) {
  typedef Vec<T> V;
  constexpr int Q = C == 1 ? 4 : RWKV6_TILE_VECTORS;
  int64_t j = 0;
  for (; j + Q * V::W <= columns; j += Q * V::W)
    forward_tile<T, X, WithY, C, Settles, Q, false>(chunk, N, j, state, 0, prefetcher);
  if (j + 2 * V::W <= columns) {
    forward_tile<T, X, WithY, C, Settles, 2, false>(chunk, N, j, state, 0, prefetcher);
    j += 2 * V::W;
  }
  for (; j + V::W <= columns; j += V::W)
    forward_tile<T, X, WithY, C, Settles, 1, false>(chunk, N, j, state, 0, prefetcher);
  if (j < columns)
    forward_tile<T, X, WithY, C, Settles, 1, true>(chunk, N, j, state, columns - j, prefetcher);
}

// Copies y to the tensor where it was computed in a padded copy.
template <class T>
void pack(const ForwardWork& job, const Sequence& sequence, Columns part,
          const ForwardChunk<T>& chunk) {
  const int64_t n = part.last - part.first, size = size_of(job.y.dtype);
  if (n % Vec<T>::W == 0) return;
  for (int64_t t = 0; t < chunk.tokens; t++) {
    char* y = job.y.row(sequence.b, sequence.begin + chunk.step + t, chunk.h);
    memcpy(y + part.first * size, chunk.y[t], size_t(n * size));
  }
}

// Prepares the state for the head's first chunk: state.from becomes the initial state's own memory
// where that has the accumulator's dtype, otherwise the initial state is converted into state.to.
template <class T>
void start(const ForwardWork& job, const Sequence& sequence, int64_t h, Columns part,
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

// One thread's working memory.
template <class T>
struct ForwardScratch {
  ForwardChunk<T> chunks[2];
  alignas(64) T u[ForwardChunk<T>::kPitch];
  alignas(64) T copies[2][kCopiedState];
  // One row for every head of the group. A chunk's decay is rounded to nearest, and what it loses
  // is added to the decay of the head's next chunk, so that a state that lives for thousands of
  // tokens is never off by more than one rounding. The last chunk of a sequence applies what is
  // left.
  alignas(64) T residuals[kHeadGroup][ForwardChunk<T>::kPitch];
};

// Goes through one sequence, for heads [first, last) and the columns of one part: block by block of
// tokens, in each block head by head, and for each head chunk by chunk. X is the inputs' dtype.
template <class T, class X, bool WithY>
struct SequenceForward {
  const ForwardWork& job;
  const Sequence& sequence;
  const int64_t first, last;
  const Columns part;
  T* const u;                                     // [N], of head h
  T (*const residuals)[ForwardChunk<T>::kPitch];  // [last - first, N]
  // [2][kCopiedState] or nullptr: where the states of the first and the last head are kept until
  // the end. In the tensor, their neighbours belong to other threads, and when two threads rewrite
  // neighbouring lines, their prefetchers keep taking these lines from each other.
  T* const copies;
  const int64_t columns = part.last - part.first;
  const int64_t block_length = block_tokens(job.N);
  int64_t block = 0, h = first, step = 0;  // of the next chunk to unpack
  // The rows of its first token: [N], for v and y the part's columns.
  const char *r = nullptr, *k = nullptr, *v = nullptr, *w = nullptr;
  char* y = nullptr;
  Prefetcher prefetcher = {};

  int64_t block_end() const {
    return sequence.length - block < block_length ? sequence.length : block + block_length;
  }

  bool done() const { return block >= sequence.length; }

  // Finds the rows of a head's tokens in the block, and has the rows that come after them
  // prefetched: the next head's in the same block, or the first head's in the next block.
  void begin_block_of_head() {
    const auto row = [&](const Tokens& x) { return x.row(sequence.b, sequence.begin + block, h); };
    const int64_t offset = part.first * size_of(job.k.dtype);
    k = row(job.k), v = row(job.v) + offset, w = row(job.w);
    if constexpr (WithY) {
      r = row(job.r), y = row(job.y) + offset;
      load_row(job.u.row(h, sequence.b), job.u.dtype, job.N, u);
    }
    prefetcher.clear();
    const bool same_block = h + 1 < last;
    const int64_t next_t = same_block ? 0 : block_length, next_h = same_block ? 1 : first - h;
    const int64_t left = sequence.length - block - next_t;
    const int64_t tokens = left < block_length ? left : block_length;
    if (tokens < kChunk) return;
    const auto want = [&](const Tokens& x, const char* at, int64_t n) {
      if (at) prefetcher.want(x, at + x.distance(next_t, next_h), tokens, n);
    };
    want(job.w, w, job.N);
    want(job.r, r, job.N);
    want(job.k, k, job.N);
    want(job.v, v, columns);
    want(job.y, y, columns);
  }

  // Gives the chunk the rows of C tokens, as pointers into the tensors where possible, and computes
  // what does not depend on the state.
  template <int C>
  RWKV6_INLINE void unpack(ForwardChunk<T>& chunk) {
    const int64_t N = job.N;
    const auto find = [&](const Tokens& x, const char*& row, int64_t n, auto& copy, auto& found) {
      RWKV6_UNROLLED (int t = 0; t < C; t++) {
        found[t] = row;
        if (n % Vec<T>::W) {
          memset(copy.row[t], 0, size_t(padded<T>(n)) * sizeof(X));
          memcpy(copy.row[t], row, size_t(n) * sizeof(X));
          found[t] = copy.row[t];
        }
        row += x.stride_t * int64_t(sizeof(X));
      }
    };
    const auto convert = [&](const Tokens& x, const char*& row, int64_t n, auto& copy,
                             auto& found) {
      const bool in_place = size_of(x.dtype) == sizeof(T) && n % Vec<T>::W == 0;
      RWKV6_UNROLLED (int t = 0; t < C; t++) {
        found[t] = in_place ? reinterpret_cast<const T*>(row) : copy.row[t];
        if (!in_place) load_row(row, x.dtype, n, copy.row[t]);
        row += x.distance(1, 0);
      }
    };
    if constexpr (WithY) {
      find(job.r, r, N, chunk.r_copy, chunk.r);
      find(job.k, k, N, chunk.k_copy, chunk.k);
      find(job.v, v, columns, chunk.v_copy, chunk.v);
      RWKV6_UNROLLED (int t = 0; t < C; t++) {
        chunk.y[t] = columns % Vec<T>::W ? static_cast<void*>(chunk.y_copy.row[t]) : y;
        y += job.y.stride_t * int64_t(sizeof(X));
      }
    } else {
      convert(job.k, k, N, chunk.k_copy, chunk.k);
      convert(job.v, v, columns, chunk.v_copy, chunk.v);
    }
    convert(job.w, w, N, chunk.w_copy, chunk.w);
    intra_chunk<T, X, WithY, C>(N, u, residuals[h - first], chunk);
  }

  void unpack_next(ForwardChunk<T>& chunk) {
    if (step == block) begin_block_of_head();
    if (step == 0) memset(residuals[h - first], 0, sizeof *residuals);
    chunk.h = h, chunk.step = step;
    chunk.tokens = step + kChunk <= block_end() ? kChunk : 1;
    chunk.settles = chunk.tokens == 1 || step + kChunk == sequence.length;
    if (chunk.tokens == kChunk)
      unpack<kChunk>(chunk);
    else
      unpack<1>(chunk);
    step += chunk.tokens;
    if (step < block_end()) return;
    if (++h == last) h = first, block += block_length;
    step = block;
  }

  // Every checkpoint is the state before some chunk.
  static_assert(kCheckpointTokens % kChunk == 0);
  static_assert(block_tokens(1) % kChunk == 0 && block_tokens(kMaxHeadSize) % kChunk == 0);
  void keep_checkpoint(const ForwardChunk<T>& chunk, const StateMove<T>& state) const {
    const int64_t row = job.sequences.checkpoint(sequence.b, sequence.begin, chunk.step);
    T* to = reinterpret_cast<T*>(job.checkpoints.matrix(row, chunk.h)) + part.first;
    for (int64_t i = 0; i < job.N; i++)
      memcpy(to + i * job.checkpoints.stride_row, state.from + i * state.from_stride,
             size_t(columns) * sizeof(T));
  }

  void compute(ForwardChunk<T>& chunk) {
    StateMove<T> state = state_of(chunk.h);
    if (chunk.step == 0)
      start(job, sequence, chunk.h, part, state);
    else if (job.checkpoints.data && chunk.step % kCheckpointTokens == 0)
      keep_checkpoint(chunk, state);
    if (chunk.tokens == 1)
      forward_tiles<T, X, WithY, 1, true>(chunk, job.N, columns, state, prefetcher);
    else if (chunk.settles)
      forward_tiles<T, X, WithY, kChunk, true>(chunk, job.N, columns, state, prefetcher);
    else
      forward_tiles<T, X, WithY, kChunk, false>(chunk, job.N, columns, state, prefetcher);
    if constexpr (WithY) pack(job, sequence, part, chunk);
  }

  StateMove<T> in_final(int64_t head) const {
    StateMove<T> state;
    state.to = reinterpret_cast<T*>(job.final.matrix(sequence.final, head)) + part.first;
    state.to_stride = job.final.stride_row;
    state.from = state.to, state.from_stride = state.to_stride;
    return state;
  }

  StateMove<T> state_of(int64_t head) const {
    if (!copies || (head != first && head != last - 1)) return in_final(head);
    T* state = copies + (head == first ? 0 : kCopiedState);
    return {state, columns, state, columns};
  }

  void put_back(int64_t head) const {
    const T* from = state_of(head).to;
    const StateMove<T> final = in_final(head);
    for (int64_t i = 0; from != final.to && i < job.N; i++)
      memcpy(final.to + i * final.to_stride, from + i * columns, size_t(columns) * sizeof(T));
  }
};

template <class T, class X, bool WithY>
void forward_heads(const ForwardWork& job, const Sequence& sequence, int64_t first, int64_t last,
                   Columns part, bool alone, ForwardScratch<T>& scratch) {
  const int64_t columns = part.last - part.first, L = sequence.length;
  if (sequence.final < 0) {  // a padding row: y is zero
    for (int64_t t = 0; t < L; t++)
      for (int64_t h = first; h < last; h++) {
        char* y = job.y.row(sequence.b, sequence.begin + t, h);
        memset(y + part.first * size_of(job.y.dtype), 0, size_t(columns * size_of(job.y.dtype)));
      }
    return;
  }
  const bool copied = !alone && L >= kCopiedTokens && job.N * columns <= kCopiedState;
  SequenceForward<T, X, WithY> pass{job,
                                    sequence,
                                    first,
                                    last,
                                    part,
                                    scratch.u,
                                    scratch.residuals,
                                    copied ? scratch.copies[0] : nullptr};
  if (L == 0) {
    for (int64_t h = first; h < last; h++) {
      StateMove<T> state = pass.state_of(h);
      start(job, sequence, h, part, state);
    }
    return;
  }
  // Unpacking is one chunk ahead of the tiles. Its long chains of dependent instructions then
  // overlap with the multiply-adds of the chunk before.
  pass.unpack_next(scratch.chunks[0]);
  int n = 0;
  for (; !pass.done(); n ^= 1) {
    pass.unpack_next(scratch.chunks[n ^ 1]);
    pass.compute(scratch.chunks[n]);
  }
  pass.compute(scratch.chunks[n]);
  pass.put_back(first);
  pass.put_back(last - 1);
}

template <class T, class X, bool WithY>
void forward_units(const ForwardWork& job, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const int64_t N = job.N, units_per_sequence = job.H * job.parts;
  const bool alone = begin == 0 && end == job.units();
  // On the stack (132 KiB for f32, 257 KiB for f64), so that a call that updates a state in place
  // cannot run out of memory half-way.
  ForwardScratch<T> scratch;
  while (begin < end) {
    const Sequence& sequence = job.list[begin / units_per_sequence];
    const int64_t h = begin % units_per_sequence / job.parts, part = begin % job.parts;
    int64_t heads = 1;
    if (job.parts == 1) {
      heads = job.H - h < kHeadGroup ? job.H - h : kHeadGroup;
      heads = end - begin < heads ? end - begin : heads;
    }
    const Columns columns = columns_of(part, job.parts, N, Vec<T>::W);
    forward_heads<T, X, WithY>(job, sequence, h, h + heads, columns, alone, scratch);
    begin += heads;
  }
}

inline void forward(const ForwardWork& job, int64_t begin, int64_t end) {
  const bool f64 = job.k.dtype == DType::f64;
  if (!job.y.data && f64)
    forward_units<double, double, false>(job, begin, end);
  else if (!job.y.data)
    forward_units<float, float, false>(job, begin, end);
  else if (f64)
    forward_units<double, double, true>(job, begin, end);
  else if (job.r.dtype == DType::f32)
    forward_units<float, float, true>(job, begin, end);
  else if (job.r.dtype == DType::bf16)
    forward_units<float, BF16, true>(job, begin, end);
  else
    forward_units<float, F16, true>(job, begin, end);
}
