// WKV6 forward: the recurrence, in blocks of tokens, on tiles of the state that stay in registers.
//
// A block of tokens is unpacked once into rows of the accumulator's dtype. Then each tile of the
// state, a few keys by two vectors of values, walks through the block: the elements of the state
// never meet each other, only y adds them up over the keys. The state lives in the output itself
// (final_state, or the caller's state), and is read and written once a block.
// Included by isa.inc inside the namespace of one instruction set.

constexpr int64_t kBlock = 16;       // tokens unpacked at a time
constexpr int64_t kTileVectors = 2;  // vectors of value columns in a tile
constexpr int64_t kHeadGroup = 8;    // heads that take turns in a block: their rows are neighbours

// The unpacked rows of one block, one head and the columns of one part. It lives on the stack (83
// KiB of f32, 166 of f64), so that a call that updates a state in place cannot fail half-way for
// want of memory.
template <class T>
struct ForwardBlock {
  static constexpr int64_t kRows = kBlock * kMaxHeadSize;
  int64_t keys, columns;  // row lengths, whole vectors
  int64_t tokens;
  alignas(64) T u[kMaxHeadSize];                   // [keys]
  alignas(64) T r[kRows], k[kRows], decay[kRows];  // [kBlock, keys]
  alignas(64) T v[kRows], y[kRows];                // [kBlock, columns]

  static int64_t padded(int64_t n) { return (n + Vec<T>::W - 1) / Vec<T>::W * Vec<T>::W; }
};

// Where a head's state comes from (null: zeros) and goes to, at the part's first column. Both may
// be the same memory.
template <class T>
struct StateMove {
  const T* from;
  int64_t from_stride;
  T* to;
  int64_t to_stride;
};

// R keys by Q vectors of values through the block. A Partial tile has fewer columns than a vector:
// `columns` of them.
template <class T, int R, int Q, bool Partial>
RWKV6_INLINE void forward_tile(ForwardBlock<T>& block, int64_t i, int64_t j,
                               const StateMove<T>& state, int64_t columns) {
  typedef Vec<T> V;
  V S[R][Q];
  if (state.from) {
    RWKV6_UNROLLED (int a = 0; a < R; a++) {
      RWKV6_UNROLLED (int q = 0; q < Q; q++) {
        const T* p = state.from + (i + a) * state.from_stride + j + q * V::W;
        S[a][q] = Partial ? V::load_first(p, columns) : V::load(p);
      }
    }
  } else {
    RWKV6_UNROLLED (int a = 0; a < R; a++)
      RWKV6_UNROLLED (int q = 0; q < Q; q++) S[a][q] = V(T(0));
  }
  const T *r = block.r + i, *k = block.k + i, *decay = block.decay + i, *v = block.v + j;
  T* y = block.y + j;
  for (int64_t t = 0; t < block.tokens; t++) {
    V v_t[Q], y_t[Q];
    RWKV6_UNROLLED (int q = 0; q < Q; q++) {
      v_t[q] = V::load(v + q * V::W);
      y_t[q] = V::load(y + q * V::W);
    }
    RWKV6_UNROLLED (int a = 0; a < R; a++) {
      const V r_i(r[a]), k_i(k[a]), d_i(decay[a]);
      RWKV6_UNROLLED (int q = 0; q < Q; q++) {
        y_t[q] = fma(r_i, S[a][q], y_t[q]);
        S[a][q] = fma(d_i, S[a][q], k_i * v_t[q]);
      }
    }
    RWKV6_UNROLLED (int q = 0; q < Q; q++) y_t[q].store(y + q * V::W);
    r += block.keys, k += block.keys, decay += block.keys;
    v += block.columns, y += block.columns;
  }
  RWKV6_UNROLLED (int a = 0; a < R; a++) {
    RWKV6_UNROLLED (int q = 0; q < Q; q++) {
      T* p = state.to + (i + a) * state.to_stride + j + q * V::W;
      Partial ? S[a][q].store_first(p, columns) : S[a][q].store(p);
    }
  }
}

// All keys of Q vectors of columns.
template <class T, int Q, bool Partial = false>
RWKV6_INLINE void forward_columns(ForwardBlock<T>& block, int64_t N, int64_t j,
                                  const StateMove<T>& state, int64_t columns = 0) {
  constexpr int R = RWKV6_TILE_ROWS;
  int64_t i = 0;
  for (; i + R <= N; i += R) forward_tile<T, R, Q, Partial>(block, i, j, state, columns);
  for (; i < N; i++) forward_tile<T, 1, Q, Partial>(block, i, j, state, columns);
}

// One head's y and state through the block.
template <class T>
void forward_block(ForwardBlock<T>& block, int64_t N, int64_t columns, const StateMove<T>& state) {
  typedef Vec<T> V;
  for (int64_t t = 0; t < block.tokens; t++) {  // y = (r . (u * k)) v to begin with
    V dot(T(0));
    for (int64_t i = 0; i < block.keys; i += V::W)
      dot = fma(V::load(block.r + t * block.keys + i),
                V::load(block.u + i) * V::load(block.k + t * block.keys + i), dot);
    const V bonus(dot.sum());
    for (int64_t j = 0; j < block.columns; j += V::W)
      (bonus * V::load(block.v + t * block.columns + j)).store(block.y + t * block.columns + j);
  }
  int64_t j = 0;
  for (; j + kTileVectors * V::W <= columns; j += kTileVectors * V::W)
    forward_columns<T, kTileVectors>(block, N, j, state);
  for (; j + V::W <= columns; j += V::W) forward_columns<T, 1>(block, N, j, state);
  if (j < columns) forward_columns<T, 1, true>(block, N, j, state, columns - j);
}

// Rows of the block into the accumulator's dtype; the next block to come is `next_t` tokens and
// `next_h` heads from here.
template <class T>
void unpack(const ForwardJob& job, const Sequence& sequence, int64_t h, Columns part, int64_t t0,
            int64_t tokens, int64_t next_t, int64_t next_h, ForwardBlock<T>& block) {
  const int64_t N = job.N, columns = part.last - part.first;
  block.tokens = tokens;
  load_row(job.u.row(h), job.u.dtype, N, block.u);
  const auto load = [&](const Tokens& x, int64_t token, int64_t first, int64_t n, T* out) {
    const char* row = x.row(sequence.b, token, h);
    if (row) {
      row += first * size_of(x.dtype);
      prefetch_row(row + x.distance(next_t, next_h), n * size_of(x.dtype));
    }
    load_row(row, x.dtype, n, out);
  };
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t step = job.reverse ? sequence.length - 1 - (t0 + t) : t0 + t;
    const int64_t token = sequence.begin + step;
    T* decay = block.decay + t * block.keys;
    load(job.r, token, 0, N, block.r + t * block.keys);
    load(job.k, token, 0, N, block.k + t * block.keys);
    load(job.w, token, 0, N, decay);
    decay_row(decay, N, decay, static_cast<T*>(nullptr));
    load(job.v, token, part.first, columns, block.v + t * block.columns);
    prefetch_row<true>(job.y.row(sequence.b, token, h) + part.first * size_of(job.y.dtype),
                       columns * size_of(job.y.dtype));
  }
}

template <class T>
void pack(const ForwardJob& job, const Sequence& sequence, int64_t h, Columns part, int64_t t0,
          const ForwardBlock<T>& block) {
  for (int64_t t = 0; t < block.tokens; t++) {
    const int64_t step = job.reverse ? sequence.length - 1 - (t0 + t) : t0 + t;
    char* y = job.y.row(sequence.b, sequence.begin + step, h);
    store_row(block.y + t * block.columns, part.last - part.first, job.y.dtype,
              y + part.first * size_of(job.y.dtype));
  }
}

// Points state.from at the head's initial state; one of another dtype is converted into state.to.
template <class T>
void start(const ForwardJob& job, const Sequence& sequence, int64_t h, Columns part,
           StateMove<T>& state) {
  const char* initial = sequence.initial < 0 ? nullptr : job.initial.matrix(sequence.initial, h);
  if (!initial || size_of(job.initial.dtype) == sizeof(T)) {
    state.from = initial ? reinterpret_cast<const T*>(initial) + part.first : nullptr;
    state.from_stride = job.initial.stride_row;
    return;
  }
  const int64_t columns = part.last - part.first;
  for (int64_t i = 0; i < job.N; i++) {
    const int64_t offset = i * job.initial.stride_row + part.first;
    T row[kMaxHeadSize + Vec<T>::W];
    load_row(initial + offset * size_of(job.initial.dtype), job.initial.dtype, columns, row);
    memcpy(state.to + i * state.to_stride, row, size_t(columns) * sizeof(T));
  }
}

// One sequence, heads [first, last), the columns of one part: block after block, the heads in turn.
template <class T>
void forward_heads(const ForwardJob& job, const Sequence& sequence, int64_t first, int64_t last,
                   Columns part, ForwardBlock<T>& block, T* own_states) {
  const int64_t N = job.N, columns = part.last - part.first;
  if (sequence.final < 0) {  // a padding row
    for (int64_t t = 0; t < sequence.length; t++)
      for (int64_t h = first; h < last; h++) {
        char* y = job.y.row(sequence.b, sequence.begin + t, h);
        memset(y + part.first * size_of(job.y.dtype), 0, size_t(columns * size_of(job.y.dtype)));
      }
    return;
  }
  const int64_t step = job.reverse ? -kBlock : kBlock;
  for (int64_t t0 = 0; t0 == 0 || t0 < sequence.length; t0 += kBlock) {
    const int64_t left = sequence.length - t0, tokens = left < kBlock ? left : kBlock;
    for (int64_t h = first; h < last; h++) {
      StateMove<T> state;
      if (job.final.data) {
        state.to = reinterpret_cast<T*>(job.final.matrix(sequence.final, h)) + part.first;
        state.to_stride = job.final.stride_row;
      } else {
        state.to = own_states + (h - first) * N * columns;
        state.to_stride = columns;
      }
      state.from = state.to, state.from_stride = state.to_stride;
      if (t0 == 0) start(job, sequence, h, part, state);
      const bool last_head = h + 1 == last;
      unpack(job, sequence, h, part, t0, tokens, last_head ? step : 0, last_head ? first - h : 1,
             block);
      forward_block(block, N, columns, state);
      pack(job, sequence, h, part, t0, block);
    }
  }
}

template <class T>
void forward(const ForwardJob& job, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const int64_t N = job.N, units_per_sequence = job.H * job.parts;
  ForwardBlock<T> block;
  block.keys = ForwardBlock<T>::padded(N);
  Scratch<T> own_states(job.final.data ? 0 : kHeadGroup * N * N);
  while (begin < end) {
    const Sequence& sequence = job.sequences[begin / units_per_sequence];
    const int64_t h = begin % units_per_sequence / job.parts, part = begin % job.parts;
    int64_t heads = 1;
    if (job.parts == 1) {
      heads = job.H - h < kHeadGroup ? job.H - h : kHeadGroup;
      heads = end - begin < heads ? end - begin : heads;
    }
    const Columns columns = columns_of(part, job.parts, N, Vec<T>::W);
    block.columns = ForwardBlock<T>::padded(columns.last - columns.first);
    forward_heads(job, sequence, h, h + heads, columns, block, own_states.begin());
    begin += heads;
  }
}
