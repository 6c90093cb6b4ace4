// WKV6 backward: gradients of r, k, w and u. (That of v is a forward walk: see dispatch.cpp.)
//
// With S_t the state before token t and G_t the gradient of the state after it,
//   dr_t[i] = sum_j S_t[i][j] dy_t[j] + u[i] k_t[i] (v_t . dy_t)
//   dk_t[i] = sum_j G_t[i][j] v_t[j]  + u[i] r_t[i] (v_t . dy_t)
//   dw_t[i] = -exp(w_t[i]) decay_t[i] sum_j S_t[i][j] G_t[i][j]
//   du[i]   = sum_t r_t[i] k_t[i] (v_t . dy_t)
//   G_{t-1} = decay_t G_t + r_t dy_t
// no term of which cancels another. Keys are independent of each other, so vectors run along the
// keys and every sum over j is a plain chain of additions. S and G are kept transposed, [j][keys].
//
// States are recomputed from checkpoints: one per segment of about sqrt(T) tokens, and within a
// segment one per block. In a block a tile of S walks forward in registers, leaving its history in
// the first-level cache, and the tile of G meets it on the way back.
// Included by isa.inc inside the namespace of one instruction set.

// The unpacked rows of one block for some keys: [kBlock, kKeys] each, u [kKeys], v and grad_y
// [kBlock, values].
template <class T>
struct BackwardBlock {
  static constexpr int64_t kKeys = kTileVectors * Vec<T>::W;  // keys handled at a time
  int64_t values, tokens;
  T *r, *k, *decay, *rate, *u, *v, *grad_y;
  T *grad_r, *grad_k, *sum_SG, *grad_u;
  T* history;  // [kBlock, RWKV6_TILE_ROWS, kKeys]

  static int64_t scratch_size(int64_t values) {
    return 2 * Scratch<T>::aligned(kKeys) + 7 * Scratch<T>::aligned(kBlock * kKeys) +
           2 * Scratch<T>::aligned(kBlock * values) +
           Scratch<T>::aligned(kBlock * RWKV6_TILE_ROWS * kKeys);
  }

  BackwardBlock(Scratch<T>& scratch, int64_t values) : values(values), tokens(0) {
    // keys beyond a part's last are computed with as well, if only to be thrown away
    memset(scratch.begin(), 0, size_t(scratch_size(values)) * sizeof(T));
    for (T** p : {&u, &grad_u}) *p = scratch.take(kKeys);
    for (T** p : {&r, &k, &decay, &rate, &grad_r, &grad_k, &sum_SG})
      *p = scratch.take(kBlock * kKeys);
    for (T** p : {&v, &grad_y}) *p = scratch.take(kBlock * values);
    history = scratch.take(kBlock * RWKV6_TILE_ROWS * kKeys);
  }
};

// R rows of the transposed state S, [R][kKeys], to the end of the block.
template <class T, int R>
RWKV6_INLINE void advance_tile(const BackwardBlock<T>& block, int64_t j, const T* from, T* to) {
  typedef Vec<T> V;
  constexpr int Q = kTileVectors;
  constexpr int64_t kKeys = BackwardBlock<T>::kKeys;
  V S[R][Q];
  RWKV6_UNROLLED (int a = 0; a < R; a++)
    RWKV6_UNROLLED (int q = 0; q < Q; q++) S[a][q] = V::load(from + a * kKeys + q * V::W);
  for (int64_t t = 0; t < block.tokens; t++) {
    V d[Q], k[Q];
    RWKV6_UNROLLED (int q = 0; q < Q; q++) {
      d[q] = V::load(block.decay + t * kKeys + q * V::W);
      k[q] = V::load(block.k + t * kKeys + q * V::W);
    }
    RWKV6_UNROLLED (int a = 0; a < R; a++) {
      const V v_j(block.v[t * block.values + j + a]);
      RWKV6_UNROLLED (int q = 0; q < Q; q++) S[a][q] = fma(d[q], S[a][q], v_j * k[q]);
    }
  }
  RWKV6_UNROLLED (int a = 0; a < R; a++)
    RWKV6_UNROLLED (int q = 0; q < Q; q++) S[a][q].store(to + a * kKeys + q * V::W);
}

// R rows of S forward and of G backward through the block; adds to grad_r, grad_k and sum_SG.
template <class T, int R>
RWKV6_INLINE void backward_tile(const BackwardBlock<T>& block, int64_t j, const T* state,
                                T* adjoint) {
  typedef Vec<T> V;
  constexpr int Q = kTileVectors;
  constexpr int64_t kKeys = BackwardBlock<T>::kKeys;
  V M[R][Q];  // S, then G
  RWKV6_UNROLLED (int a = 0; a < R; a++)
    RWKV6_UNROLLED (int q = 0; q < Q; q++) M[a][q] = V::load(state + a * kKeys + q * V::W);
  for (int64_t t = 0; t < block.tokens; t++) {
    V d[Q], k[Q], grad_r[Q];
    T* history = block.history + t * R * kKeys;
    RWKV6_UNROLLED (int q = 0; q < Q; q++) {
      d[q] = V::load(block.decay + t * kKeys + q * V::W);
      k[q] = V::load(block.k + t * kKeys + q * V::W);
      grad_r[q] = V::load(block.grad_r + t * kKeys + q * V::W);
    }
    RWKV6_UNROLLED (int a = 0; a < R; a++) {
      const V v_j(block.v[t * block.values + j + a]), dy_j(block.grad_y[t * block.values + j + a]);
      RWKV6_UNROLLED (int q = 0; q < Q; q++) {
        M[a][q].store(history + a * kKeys + q * V::W);
        grad_r[q] = fma(dy_j, M[a][q], grad_r[q]);
        M[a][q] = fma(d[q], M[a][q], v_j * k[q]);
      }
    }
    RWKV6_UNROLLED (int q = 0; q < Q; q++) grad_r[q].store(block.grad_r + t * kKeys + q * V::W);
  }
  RWKV6_UNROLLED (int a = 0; a < R; a++)
    RWKV6_UNROLLED (int q = 0; q < Q; q++) M[a][q] = V::load(adjoint + a * kKeys + q * V::W);
  for (int64_t t = block.tokens - 1; t >= 0; t--) {
    V d[Q], r[Q], grad_k[Q], sum_SG[Q];
    const T* history = block.history + t * R * kKeys;
    RWKV6_UNROLLED (int q = 0; q < Q; q++) {
      d[q] = V::load(block.decay + t * kKeys + q * V::W);
      r[q] = V::load(block.r + t * kKeys + q * V::W);
      grad_k[q] = V::load(block.grad_k + t * kKeys + q * V::W);
      sum_SG[q] = V::load(block.sum_SG + t * kKeys + q * V::W);
    }
    RWKV6_UNROLLED (int a = 0; a < R; a++) {
      const V v_j(block.v[t * block.values + j + a]), dy_j(block.grad_y[t * block.values + j + a]);
      RWKV6_UNROLLED (int q = 0; q < Q; q++) {
        grad_k[q] = fma(v_j, M[a][q], grad_k[q]);
        sum_SG[q] = fma(V::load(history + a * kKeys + q * V::W), M[a][q], sum_SG[q]);
        M[a][q] = fma(d[q], M[a][q], dy_j * r[q]);
      }
    }
    RWKV6_UNROLLED (int q = 0; q < Q; q++) {
      grad_k[q].store(block.grad_k + t * kKeys + q * V::W);
      sum_SG[q].store(block.sum_SG + t * kKeys + q * V::W);
    }
  }
  RWKV6_UNROLLED (int a = 0; a < R; a++)
    RWKV6_UNROLLED (int q = 0; q < Q; q++) M[a][q].store(adjoint + a * kKeys + q * V::W);
}

template <class T>
void advance_block(const BackwardBlock<T>& block, int64_t N, const T* from, T* to) {
  constexpr int R = RWKV6_TILE_ROWS;
  constexpr int64_t kKeys = BackwardBlock<T>::kKeys;
  int64_t j = 0;
  for (; j + R <= N; j += R) advance_tile<T, R>(block, j, from + j * kKeys, to + j * kKeys);
  for (; j < N; j++) advance_tile<T, 1>(block, j, from + j * kKeys, to + j * kKeys);
}

// Leaves the block's gradients in it and adds its share to grad_u; G moves to the block's start.
template <class T>
void backward_block(BackwardBlock<T>& block, int64_t N, const T* state, T* adjoint) {
  typedef Vec<T> V;
  constexpr int R = RWKV6_TILE_ROWS;
  constexpr int64_t kKeys = BackwardBlock<T>::kKeys;
  for (T* sums : {block.grad_r, block.grad_k, block.sum_SG})
    memset(sums, 0, size_t(block.tokens * kKeys) * sizeof(T));
  int64_t j = 0;
  for (; j + R <= N; j += R) backward_tile<T, R>(block, j, state + j * kKeys, adjoint + j * kKeys);
  for (; j < N; j++) backward_tile<T, 1>(block, j, state + j * kKeys, adjoint + j * kKeys);
  for (int64_t t = block.tokens - 1; t >= 0; t--) {
    V dot(T(0));
    for (int64_t c = 0; c < block.values; c += V::W)
      dot = fma(V::load(block.v + t * block.values + c),
                V::load(block.grad_y + t * block.values + c), dot);
    const V v_dy(dot.sum());
    for (int64_t c = 0; c < kKeys; c += V::W) {
      const int64_t at = t * kKeys + c;
      const V r = V::load(block.r + at), k = V::load(block.k + at), u = V::load(block.u + c);
      fma(u * k, v_dy, V::load(block.grad_r + at)).store(block.grad_r + at);
      fma(u * r, v_dy, V::load(block.grad_k + at)).store(block.grad_k + at);
      fma(r * k, v_dy, V::load(block.grad_u + c)).store(block.grad_u + c);
      const V slope = V::load(block.rate + at) * V::load(block.decay + at) * V(T(-1));
      (slope * V::load(block.sum_SG + at)).store(block.sum_SG + at);  // now the gradient of w
    }
  }
}

// Rows of the block into the accumulator's dtype: k, v and decay for the state's walk, everything
// for the way back. The next block to come is `next` tokens from here.
template <class T>
void unpack(const BackwardJob& job, const Sequence& sequence, int64_t h, Columns keys, int64_t t0,
            int64_t tokens, bool everything, int64_t next, BackwardBlock<T>& block) {
  constexpr int64_t kKeys = BackwardBlock<T>::kKeys;
  const Columns values = {0, job.N};
  const auto load = [&](const Tokens& x, int64_t token, Columns part, T* out) {
    const char* row = x.row(sequence.b, token, h);
    const int64_t n = part.last - part.first;
    if (row) {
      row += part.first * size_of(x.dtype);
      prefetch_row(row + x.distance(next, 0), n * size_of(x.dtype));
    }
    load_row(row, x.dtype, n, out);
  };
  block.tokens = tokens;
  for (int64_t t = 0; t < tokens; t++) {
    const int64_t token = sequence.begin + t0 + t;
    T* decay = block.decay + t * kKeys;
    load(job.k, token, keys, block.k + t * kKeys);
    load(job.w, token, keys, decay);
    decay_row(decay, keys.last - keys.first, decay, block.rate + t * kKeys);
    load(job.v, token, values, block.v + t * block.values);
    if (!everything) continue;
    load(job.r, token, keys, block.r + t * kKeys);
    load(job.grad_y, token, values, block.grad_y + t * block.values);
    for (const Tokens* x : {&job.grad_r, &job.grad_k, &job.grad_w})
      prefetch_row<true>(x->row(sequence.b, token, h) + keys.first * size_of(x->dtype),
                         (keys.last - keys.first) * size_of(x->dtype));
  }
}

template <class T>
void pack(const BackwardJob& job, const Sequence& sequence, int64_t h, Columns keys, int64_t t0,
          const BackwardBlock<T>& block) {
  const int64_t n = keys.last - keys.first;
  const auto store_keys = [&](const T* in, const Tokens& x, int64_t t) {
    char* row = x.row(sequence.b, sequence.begin + t0 + t, h);
    store_row(in + t * BackwardBlock<T>::kKeys, n, x.dtype, row + keys.first * size_of(x.dtype));
  };
  for (int64_t t = 0; t < block.tokens; t++) {
    store_keys(block.grad_r, job.grad_r, t);
    store_keys(block.grad_k, job.grad_k, t);
    store_keys(block.sum_SG, job.grad_w, t);
  }
}

// Keys [first, last) of a [key][value] matrix, transposed: out [N][kKeys].
template <class T>
void transpose_keys(const char* matrix, const States& states, int64_t N, Columns keys, T* out) {
  constexpr int64_t kKeys = BackwardBlock<T>::kKeys;
  memset(out, 0, size_t(N * kKeys) * sizeof(T));
  if (!matrix) return;
  T row[kMaxHeadSize + Vec<T>::W];
  for (int64_t i = keys.first; i < keys.last; i++) {
    load_row(matrix + i * states.stride_row * size_of(states.dtype), states.dtype, N, row);
    for (int64_t j = 0; j < N; j++) out[j * kKeys + i - keys.first] = row[j];
  }
}

struct Segments {  // a sequence cut into `count` segments of `blocks` blocks
  int64_t blocks, count;

  explicit Segments(int64_t length) : blocks(1) {
    const int64_t all = (length + kBlock - 1) / kBlock;
    while (blocks * blocks < all) blocks++;
    count = (all + blocks - 1) / blocks;
  }
};

// One sequence, one head, at most kKeys keys.
template <class T>
void backward_keys(const BackwardJob& job, int64_t index, int64_t h, Columns keys,
                   BackwardBlock<T>& block, T* adjoint, T* segment_states, T* block_states) {
  constexpr int64_t kKeys = BackwardBlock<T>::kKeys;
  const Sequence& sequence = job.sequences[index];
  const int64_t N = job.N, L = sequence.length, state_size = N * kKeys, n = keys.last - keys.first;
  const Segments segments(L);
  const auto tokens_at = [&](int64_t t0) { return L - t0 < kBlock ? L - t0 : kBlock; };

  transpose_keys(sequence.initial < 0 ? nullptr : job.initial.matrix(sequence.initial, h),
                 job.initial, N, keys, segment_states);
  transpose_keys(job.grad_final.matrix(index, h), job.grad_final, N, keys, adjoint);
  load_row(job.u.row(h) + keys.first * size_of(job.u.dtype), job.u.dtype, n, block.u);
  memset(block.grad_u, 0, size_t(kKeys) * sizeof(T));

  for (int64_t s = 0; s + 1 < segments.count; s++) {
    T* next = segment_states + (s + 1) * state_size;
    const T* from = segment_states + s * state_size;
    for (int64_t c = 0; c < segments.blocks; c++, from = next) {
      const int64_t t0 = (s * segments.blocks + c) * kBlock;
      unpack(job, sequence, h, keys, t0, tokens_at(t0), false, kBlock, block);
      advance_block(block, N, from, next);
    }
  }
  for (int64_t s = segments.count - 1; s >= 0; s--) {
    const int64_t first = s * segments.blocks * kBlock;
    int64_t blocks = (L - first + kBlock - 1) / kBlock;
    blocks = blocks < segments.blocks ? blocks : segments.blocks;
    const T* from = segment_states + s * state_size;
    for (int64_t c = 0; c + 1 < blocks; c++) {  // block_states holds those after the first
      const int64_t t0 = first + c * kBlock;
      unpack(job, sequence, h, keys, t0, tokens_at(t0), false, kBlock, block);
      advance_block(block, N, from, block_states + c * state_size);
      from = block_states + c * state_size;
    }
    for (int64_t c = blocks - 1; c >= 0; c--) {
      const int64_t t0 = first + c * kBlock;
      const T* state = c ? block_states + (c - 1) * state_size : segment_states + s * state_size;
      unpack(job, sequence, h, keys, t0, tokens_at(t0), true, -kBlock, block);
      backward_block(block, N, state, adjoint);
      pack(job, sequence, h, keys, t0, block);
    }
  }
  memcpy(static_cast<T*>(job.grad_u) + (index * job.H + h) * N + keys.first, block.grad_u,
         size_t(n) * sizeof(T));
}

template <class T>
void backward(const BackwardJob& job, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  constexpr int64_t kKeys = BackwardBlock<T>::kKeys;
  const int64_t N = job.N, units_per_sequence = job.H * job.parts;
  const int64_t values = ForwardBlock<T>::padded(N), state_size = N * kKeys;
  if (begin == end) return;
  int64_t longest = 0;
  for (int64_t s = begin / units_per_sequence; s <= (end - 1) / units_per_sequence; s++)
    longest = job.sequences[s].length > longest ? job.sequences[s].length : longest;
  const Segments most(longest);
  const int64_t checkpoints = (most.count > 1 ? most.count : 1) + most.blocks;
  Scratch<T> scratch(BackwardBlock<T>::scratch_size(values) +
                     (checkpoints + 1) * Scratch<T>::aligned(state_size));
  BackwardBlock<T> block(scratch, values);
  T* adjoint = scratch.take(state_size);
  T* block_states = scratch.take(most.blocks * state_size);
  T* segment_states = scratch.take((checkpoints - most.blocks) * state_size);
  for (int64_t unit = begin; unit < end; unit++) {
    const int64_t index = unit / units_per_sequence;
    const int64_t h = unit % units_per_sequence / job.parts, part = unit % job.parts;
    const Columns all = columns_of(part, job.parts, N, Vec<T>::W);
    for (int64_t first = all.first; first < all.last; first += kKeys) {
      const int64_t last = first + kKeys < all.last ? first + kKeys : all.last;
      backward_keys(job, index, h, Columns{first, last}, block, adjoint, segment_states,
                    block_states);
    }
  }
}
