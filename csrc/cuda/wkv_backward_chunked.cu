// The chunked backward: see chunk.cuh. With G the gradient of the state behind a chunk, S the state
// before it and P[t][s] = grad_y_t . v_s:
//   dr_t = d_0 .. d_{t-1} (S grad_y_t)  + sum_{s<t} d_{s+1} .. d_{t-1} k_s P[t][s] + u k_t P[t][t]
//   dk_s = d_{s+1} .. d_15 (G v_s)      + sum_{t>s} d_{s+1} .. d_{t-1} r_t P[t][s] + u r_s P[s][s]
//   dv_s = K_s G + sum_{t>=s} A[t][s] grad_y_t
//   G   <- (d_0 .. d_15) G + sum_t R_t grad_y_t
//   dw_q = -exp(w_q) * the sum of what r_t, k_s and the states add to each other across token q
// The last, too, level by level: a term of a pair s < t, or of the states on either side, crosses
// the tokens between. It is found with the pair and added to those, never as the difference of two
// long sums, so that little is left of it only where it is little.
//
// One block walks a segment backwards. Half of its warps have 16 values each of G and give dv, the
// other half have 16 keys each, of the same G, and give dr, dk and dw. S comes from the checkpoints,
// one every kGroup chunks; the states between are recomputed and pass through a scratch in L2.
#include "cuda/chunk.cuh"
#include "cuda/chunked.cuh"

namespace rwkv6::cuda {
namespace {

template <int N>
struct Shared {
  alignas(16) Place at;  // here, as what follows, because registers are few
  float u[N], du[kQuads][N];
  // As in the forward; then the gradients of the same rows, before their scales.
  Rows<N> levels[kLevels], r, k;
  float products[kQuads][N], total[N];
  float crossing[N];  // sum_j S[i][j] G[i][j]
  float sums[3][kQuads][N];
  Pairs pairs;  // A transposed
  Bonus<N, 1> bonus;
  float diagonal[kChunk];  // P[t][t]
  // and behind it one or two buffers of r, k, v, grad_y and w
  using Staged = Buffers<N, 4>;
  static constexpr int bytes(bool wide, int buffers) {
    return int(sizeof(Shared)) + buffers * Staged::bytes(wide);
  }
};
static_assert(sizeof(Shared<32>) % 16 == 0 && sizeof(Shared<64>) % 16 == 0 &&
              sizeof(Shared<128>) % 16 == 0 && Shared<128>::bytes(true, 1) <= kLeastSharedMemory);

// A warp's 16 keys of a state: [p][e] has values 16p + 4t + e and 16p + 4t + 2 + e, of key g and
// then of key g + 8.
template <int N>
using KeyTile = float[N / 16][2][4];

template <int N>
__device__ inline void load_key_tile(KeyTile<N>& x, const float* state, int64_t stride, int key) {
  const Lane lane;
#pragma unroll
  for (int p = 0; p < N / 16; p++)
#pragma unroll
    for (int e = 0; e < 2; e++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        x[p][e][i] = state ? state[(key + lane.g + 8 * (i / 2)) * stride + 16 * p + 4 * lane.t +
                                   2 * (i % 2) + e]
                           : 0.f;
}

// Values 16p + 4t to 16p + 4t + 3 of tokens g and g + 8: left operands [e] of products over values.
template <class E, int N>
__device__ inline void load_tokens(uint32_t (&a)[2][4], const uint32_t* raw, int p) {
  const Lane lane;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint2 four = *reinterpret_cast<const uint2*>(
        &raw[(lane.g + 8 * half) * kRawRow<N> + 8 * p + 2 * lane.t]);
    a[0][half] = __float_as_uint(E::low(four.x)), a[0][half + 2] = __float_as_uint(E::low(four.y));
    a[1][half] = __float_as_uint(E::high(four.x));
    a[1][half + 2] = __float_as_uint(E::high(four.y));
  }
}

// G <- total G + sum_t rows[t] grad_y_t, for the warp's keys
template <class E, int N>
__device__ inline void update_key_tile(KeyTile<N>& x, const float (&total)[N], const Rows<N>& rows,
                                       const uint32_t* raw, int key) {
  const Lane lane;
  const float upper = total[key + lane.g], lower = total[key + lane.g + 8];
  uint32_t a[2][2][4];  // [low or high][step]
#pragma unroll
  for (int step = 0; step < 2; step++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const TwoTf32 x(rows[8 * step + lane.t + 4 * (i / 2)][key + lane.g + 8 * (i % 2)]);
      a[0][step][i] = x.low, a[1][step][i] = x.high;
    }
#pragma unroll
  for (int p = 0; p < N / 16; p++) {
    float added[2][4] = {};
#pragma unroll
    for (int step = 0; step < 2; step++) {
      const uint32_t* two = &raw[(8 * step + lane.t) * kRawRow<N> + 8 * p + lane.g];
      const uint32_t b0 = two[0], b1 = two[4 * kRawRow<N>];
#pragma unroll
      for (int part = 0; part < 2; part++) {
        mma(added[0], a[part][step], __float_as_uint(E::low(b0)), __float_as_uint(E::low(b1)));
        mma(added[1], a[part][step], __float_as_uint(E::high(b0)), __float_as_uint(E::high(b1)));
      }
    }
#pragma unroll
    for (int e = 0; e < 2; e++)
#pragma unroll
      for (int i = 0; i < 4; i++) x[p][e][i] = fmaf(i < 2 ? upper : lower, x[p][e][i], added[e][i]);
  }
}

// [16 tokens][16 keys] of a warp: keys 8q + 2t, 8q + 2t + 1 of tokens g and g + 8.
using TokenTile = float[2][4];

template <int N>
__device__ inline void store_tile(Rows<N>& rows, const TokenTile& x, int key) {
  const Lane lane;
#pragma unroll
  for (int q = 0; q < 2; q++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      *reinterpret_cast<float2*>(&rows[lane.g + 8 * half][key + 8 * q + 2 * lane.t]) = {
          x[q][2 * half], x[q][2 * half + 1]};
}

// grad_y S^T and v G^T for the warp's keys, and sum_j S[i][j] G[i][j].
template <class E, int N>
__device__ inline void meet_states(TokenTile& dr, TokenTile& dk, float (&crossing)[N],
                                   const float* state,  // [N][N]
                                   const KeyTile<N>& grad, const uint32_t* raw_grad_y,
                                   const uint32_t* raw_v, int key) {
  const Lane lane;
  const float* rows = state + (key + lane.g) * N + 4 * lane.t;
  float both[2] = {};
#pragma unroll
  for (int p = 0; p < N / 16; p++) {
    float4 s[2];
#pragma unroll
    for (int q = 0; q < 2; q++)
      s[q] = __ldcg(reinterpret_cast<const float4*>(rows + 8 * q * N + 16 * p));
    uint32_t a[2][4];
    load_tokens<E, N>(a, raw_grad_y, p);
#pragma unroll
    for (int q = 0; q < 2; q++) {
      mma(dr[q], a[0], tf32(s[q].x), tf32(s[q].z));
      mma(dr[q], a[1], tf32(s[q].y), tf32(s[q].w));
      both[q] += s[q].x * grad[p][0][2 * q] + s[q].z * grad[p][0][2 * q + 1] +
                 s[q].y * grad[p][1][2 * q] + s[q].w * grad[p][1][2 * q + 1];
    }
    load_tokens<E, N>(a, raw_v, p);
#pragma unroll
    for (int q = 0; q < 2; q++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        mma(dk[q], a[e], tf32(grad[p][e][2 * q]), tf32(grad[p][e][2 * q + 1]));
  }
#pragma unroll
  for (int q = 0; q < 2; q++) {
    both[q] += __shfl_xor_sync(0xffffffffu, both[q], 1);
    both[q] += __shfl_xor_sync(0xffffffffu, both[q], 2);
    if (lane.t == 0) crossing[key + 8 * q + lane.g] = both[q];
  }
}

// All pairs of tokens as left operand of a product over tokens: [step] = tokens 8 step + t and
// 8 step + t + 4 of rows g and g + 8.
using PairTile = float[2][4];

// out[a][b] = x_a . y_b, exact products of 16-bit rows.
template <class E, int N>
__device__ inline void all_pairs(PairTile& out, const uint32_t* raw_x, const uint32_t* raw_y) {
  const int l = threadIdx.x % 32, n = l % 8;
  const uint32_t* x = raw_x + (n + l / 8 % 2 * 8) * kRawRow<N> + l / 16 * 4;
  const uint32_t* y = raw_y + (n / 2 + n % 2 * 4 + l / 16 * 8) * kRawRow<N> + l / 8 % 2 * 4;
#pragma unroll
  for (int j = 0; j < N / 16; j++) {
    uint32_t a[4], b[4];
    load_matrices(a, x + 8 * j);
    load_matrices(b, y + 8 * j);
    E::mma(out[0], a, b[0], b[1]);
    E::mma(out[1], a, b[2], b[3]);
  }
}

// Symmetric: P[t][s] for both orders of s < t; and, by one warp, the diagonal to shared memory.
template <class E, int N>
__device__ inline void load_pairs(PairTile& pairs, float (&diagonal)[kChunk],
                                  const uint32_t* raw_grad_y, const uint32_t* raw_v,
                                  bool has_diagonal) {
  PairTile other = {};
#pragma unroll
  for (int step = 0; step < 2; step++)
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[step][i] = 0.f;
  all_pairs<E, N>(pairs, raw_grad_y, raw_v);
  all_pairs<E, N>(other, raw_v, raw_grad_y);
  const Lane lane;
#pragma unroll
  for (int step = 0; step < 2; step++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = lane.g + i / 2 * 8, column = 8 * step + lane.t + i % 2 * 4;
      if (has_diagonal && row == column) diagonal[row] = pairs[step][i];
      if (row < column) pairs[step][i] = other[step][i];
    }
}

// Whether a pair of tokens is one of a level: the highest bit in which they differ is the level's.
__device__ inline bool is_of_level(int row, int column, int level) {
  return (row ^ column) >> level == 1;
}

// A level's gradients of its rows, in place, for the warp's keys.
template <class E, int N>
__device__ inline void level_gradient(Rows<N>& rows, int level, const PairTile& pairs, int key) {
  const Lane lane;
  TokenTile out = {};
#pragma unroll
  for (int step = 0; step < 2; step++) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = lane.g + i % 2 * 8, column = 8 * step + lane.t + i / 2 * 4;
      const float pair = pairs[step][i % 2 * 2 + i / 2];
      const float a = is_of_level(row, column, level) ? pair : 0.f;
      high[i] = E::kFine ? __float_as_uint(a) : tf32(a), low[i] = TwoTf32(a).low;
    }
#pragma unroll
    for (int q = 0; q < 2; q++) {
      const float* column = &rows[8 * step + lane.t][key + 8 * q + lane.g];
      const uint32_t b0 = __float_as_uint(column[0]), b1 = __float_as_uint(column[4 * (N + 8)]);
      if (E::kFine) mma(out[q], low, b0, b1);
      mma(out[q], high, b0, b1);
    }
  }
  __syncwarp();
  store_tile<N>(rows, out, key);
}

// The same where rows may be NaN or infinite: zero times that would be NaN.
template <int N>
__device__ inline void strange_level_gradient(Rows<N>& rows, int level, const PairTile& pairs,
                                              int key) {
  const Lane lane;
  TokenTile out = {};
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll 1
    for (int t = 0; t < 4; t++) {  // lane t of those with the same g has this column's pairs
      const int column = 4 * i + t;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float pair = __shfl_sync(kAllLanes, pairs[i / 2][2 * half + i % 2], t, 4);
        if (!is_of_level(lane.g + 8 * half, column, level)) continue;
#pragma unroll
        for (int q = 0; q < 2; q++)
#pragma unroll
          for (int e = 0; e < 2; e++)
            out[q][2 * half + e] += pair * rows[column][key + 8 * q + 2 * lane.t + e];
      }
    }
  __syncwarp();
  store_tile<N>(rows, out, key);
}

// The state behind a chunk from the one before it, through memory: to = total from + sum rows v.
template <class E, int N>
__device__ inline void advance_state(float* to,          // [N][N]
                                     const float* from,  // [N][N]
                                     const float (&total)[N], const Rows<N>& rows,
                                     const uint32_t* raw_v, int value) {
  ValueTile v;
  load_values<E, N>(v, raw_v, value);
  constexpr int kAtOnce = 4;  // all would take more registers than there are beside G
#pragma unroll 1
  for (int j = 0; j < N / 8; j += kAtOnce) {
    float s[kAtOnce][4];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) load_keys(s[i], j + i, from, N, value);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) update_keys<N>(s[i], j + i, total, rows, v);
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) store_keys(s[i], j + i, to, N, value);
  }
}

// Of one key and the tokens of a quad; w that of log(d) until it is finished.
struct Gradients {
  float r[kQuad], k[kQuad], w[kQuad];
};
// Scales the rows' gradients and adds up what crosses each token within the quad; shares what
// crosses the other quads.
template <class E, int N>
__device__ inline void collect(Gradients& out, Shared<N>& shared, const Quad<E, N, 4 * N>& my,
                               const float (&r)[kQuad][1], const float (&k)[kQuad][1]) {
  float to_start[1], to_end[1], to_middle[1], sums[3] = {};
  my.product(to_start, 0, my.quad);
  my.product(to_end, my.quad + 1, kQuads);
  my.outer_scale(to_middle);
  const bool upper_half = my.quad / 2, odd_quad = my.quad % 2;
#pragma unroll
  for (int t = 0; t < kQuad; t++) {
    const int token = kQuad * my.quad + t;
    const float before = my.before[t][0], after = my.after[t][0];
    const float of_states = before * to_start[0] * shared.r[token][my.key];
    const float of_later = after * to_end[0] * shared.k[token][my.key];
    const float of_half =
        (upper_half ? before : after) * to_middle[0] * shared.levels[3][token][my.key];
    const float of_quad = (odd_quad ? before : after) * shared.levels[2][token][my.key];
    const float of_pair = (t == 0   ? my.d[1][0]
                           : t == 3 ? my.d[2][0]
                                    : 1.f) *
                          shared.levels[1][token][my.key];
    const float of_neighbour = shared.levels[0][token][my.key];
    out.r[t] = of_states + (upper_half ? of_half : 0.f) + (odd_quad ? of_quad : 0.f);
    out.k[t] = of_later + (upper_half ? 0.f : of_half) + (odd_quad ? 0.f : of_quad);
    // r's gradient crosses the tokens before, k's the tokens after
    const float back = r[t][0] * out.r[t], on = k[t][0] * out.k[t];
#pragma unroll
    for (int s = 0; s < kQuad; s++) out.w[s] += s < t ? back : s > t ? on : 0.f;
    sums[0] += r[t][0] * of_states;
    sums[1] += k[t][0] * of_later;
    sums[2] += (upper_half ? r[t][0] : k[t][0]) * of_half;
    if (t == 0) out.w[1] += k[t][0] * of_pair;
    if (t == 3) out.w[2] += r[t][0] * of_pair;
    (t / 2 ? out.r : out.k)[t] += of_pair;
    (t % 2 ? out.r : out.k)[t] += of_neighbour;
  }
#pragma unroll
  for (int i = 0; i < 3; i++) shared.sums[i][my.quad][my.key] = sums[i];
}

// Adds the other quads' terms and the bonus; returns the gradient of u.
template <class E, int N>
__device__ inline float finish(Gradients& out, const Shared<N>& shared, const Quad<E, N, 4 * N>& my,
                               const float (&r)[kQuad][1], const float (&k)[kQuad][1],
                               const float (&w)[kQuad][1], int decaying) {
  const float u = shared.u[my.key];
  float all[1], du = 0.f;
  my.product(all, 0, kQuads);
  float crossing = all[0] * shared.crossing[my.key];
#pragma unroll
  for (int q = 0; q < kQuads; q++)
    if (q != my.quad) crossing += shared.sums[q > my.quad ? 0 : 1][q][my.key];
  if (my.quad == 1) crossing += shared.sums[2][0][my.key];
  if (my.quad == 2) crossing += shared.sums[2][3][my.key];
#pragma unroll
  for (int t = 0; t < kQuad; t++) {
    const float p = shared.diagonal[kQuad * my.quad + t];
    out.r[t] += u * k[t][0] * p;
    out.k[t] += u * r[t][0] * p;
    du += r[t][0] * k[t][0] * p;
    // where exp(w) has no value in f32, what crosses is exactly 0
    const float rate = exp2_approx(kLog2E * fminf(w[t][0], 80.f));
    const float without = w[t][0] == w[t][0] ? 0.f : w[t][0];  // a NaN stays one
    out.w[t] = kQuad * my.quad + t < decaying ? -rate * (crossing + out.w[t]) : without;
  }
  return du;
}

// Stores four tokens of one key, two neighbours of a pair of lanes at a time.
template <class E>
__device__ inline void store_quad(const float (&x)[kQuad], const Tokens& to, const Place& at,
                                  int64_t first, int key) {
  const bool odd = threadIdx.x % 2;
  // the even lane has tokens 0 and 1 of both keys, the odd one 2 and 3
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float mine = odd ? x[i + 2] : x[i];
    const float other = __shfl_xor_sync(0xffffffffu, odd ? x[i] : x[i + 2], 1);
    const int64_t token = first + i + (odd ? 2 : 0);
    if (token >= at.last) continue;
    char* row = to.row(at.span.b, at.span.begin + token, at.h);
    const float low = odd ? other : mine, high = odd ? mine : other;
    if (to.dtype == DType::f32)
      *reinterpret_cast<float2*>(row + 4 * (key & ~1)) = {low, high};
    else
      *reinterpret_cast<uint32_t*>(row + 2 * (key & ~1)) = E::pack(low, high);
  }
}

// What a warp has of the states: 16 values, or 16 keys; its first.
template <int N>
struct Share {
  int warp = thread_index() / 32;
  bool has_values = warp < N / 16;
  int value = 16 * warp, key = value - N;
};

struct Given {
  States checkpoints;  // dense
  const float* ends;   // [segment][H][N][N], G behind each segment, or nullptr
  float* scratch;      // [segment][H][kGroup][N][N], the first for the initial state
  float* grad_u;       // [segment][H][N]
  int buffers;         // of staged rows: 2, of which one is filled while the other is read, or 1
};

template <class E, int N>
__global__ void __launch_bounds__(4 * N, N == 128 ? 1 : 2)
    backward_chunked_kernel(const __grid_constant__ BackwardJob job,
                            const __grid_constant__ Segments segments, const Given given) {
  constexpr int kThreads = 4 * N, K = 1, kValueWarps = N / 16;
  extern __shared__ __align__(16) char memory[];
  Shared<N>& shared = *reinterpret_cast<Shared<N>*>(memory);
  if (threadIdx.x == 0) shared.at = Place(job.sequences, segments, job.H);
  __syncthreads();
  const Place& at = shared.at;
  const auto grad_u = [&] { return given.grad_u + int64_t(blockIdx.x) * N; };
  if (!at.span.valid) {
    for (const Tokens* to : {&job.grad_r, &job.grad_k, &job.grad_v}) fill_rows<N>(*to, at);
    fill_rows<N>(job.grad_w, at);
    if (threadIdx.x < N) grad_u()[threadIdx.x] = NAN;
    if (job.grad_initial.data && at.segment == 0)
      fill_matrix<N>(f32_matrix(job.grad_initial, at.m, at.h), job.grad_initial.stride_row, NAN);
    return;
  }

  const auto scratch = [&](int chunk) {
    return given.scratch + (int64_t(blockIdx.x) * kGroup + chunk) * (N * N);
  };
  if (const Share<N> of = {}; at.first == 0 && of.has_values) {
    StateTile<N> s;
    load_state<E, N>(s, job.initial, at.span.initial, at.h, of.value);
    store_state<N>(s, scratch(0), N, of.value);
  }
  float g[N / 8][4];  // G: the StateTile of a warp with values, the KeyTile of one with keys
  KeyTile<N>& g_keys = reinterpret_cast<KeyTile<N>&>(g);
  {
    const Share<N> of = {};
    const bool cut = given.ends && at.cut;
    const float* end =
        cut ? given.ends + int64_t(blockIdx.x) * (N * N) : f32_matrix(job.grad_final, at.m, at.h);
    const int64_t stride = cut ? N : job.grad_final.stride_row;
    if (!of.has_values)
      load_key_tile<N>(g_keys, end, stride, of.key);
    else if (end)
      load_state<N>(g, end, stride, of.value);
    else
      fill_state<N>(g, 0.f);
  }

  const bool wide = job.w.dtype == DType::f32;
  const typename Shared<N>::Staged staged(&shared + 1, wide);
  const auto chunks = [&] { return int((at.last - at.first + kChunk - 1) / kChunk); };

  // The steps of a group of n chunks: the first n - 1 to recompute their states, then all n
  // backwards.
  struct Step {
    int group, i, n;
    __device__ bool recomputes() const { return i < n - 1; }
    __device__ int chunk() const { return recomputes() ? i : 2 * (n - 1) - i; }
  };
  const auto start_of = [&](int group) {
    return Step{group, 0, min(chunks() - group * kGroup, kGroup)};
  };
  const auto next = [&](const Step& step) {
    if (step.i < 2 * (step.n - 1)) return Step{step.group, step.i + 1, step.n};
    return start_of(step.group - 1);
  };
  const auto first_of = [&](const Step& step) {
    return at.first + int64_t(step.group * kGroup + step.chunk()) * kChunk;
  };
  // One half of the threads copies r and v, the other one k and grad_y, which is twice as many as a
  // tensor has pieces.
  const auto stage_step = [&](const Step& step, int buffer) {
    const int offset = (step.group * kGroup + step.chunk()) * kChunk;
    const int tokens = at.tokens(at.first + offset);
    const int thread = thread_index(), half = thread / (2 * N), piece = thread % (2 * N);
    if (half == 1 || !step.recomputes())
      Source<N>(half ? job.k : job.r, at, piece)
          .template stage<2 * N>(staged.tensor(buffer, half), offset, tokens);
    if (half == 0 || !step.recomputes())
      Source<N>(half ? job.grad_y : job.v, at, piece)
          .template stage<2 * N>(staged.tensor(buffer, half ? 3 : 2), offset, tokens);
    if (wide || half == 0)
      Source<N>(job.w, at, thread, wide)
          .template stage<kThreads>(staged.w(buffer), offset, tokens, wide);
    cp_async_commit();
  };
  const auto state_before = [&](const Step& step) -> const float* {
    const int64_t token = at.first + step.group * kCheckpointTokens;
    if (step.chunk() > 0 || token == 0) return scratch(step.chunk());
    return f32_matrix(given.checkpoints, job.sequences.checkpoint(at.span.b, at.span.begin, token),
                      at.h);
  };

  {
    const Quad<E, N, kThreads> my;
    float u[K];
    load_u<E, K>(u, job.u, at.h, at.span.b, my.key);
    shared.du[my.quad][my.key] = 0.f;
    if (my.quad == 0) shared.u[my.key] = u[0];
  }

  Step step = start_of((chunks() - 1) / kGroup);
  const bool ahead = given.buffers == 2;
  if (ahead && chunks()) stage_step(step, 0);
  for (int buffer = 0; at.first < at.last && step.group >= 0; step = next(step), buffer ^= ahead) {
    const int64_t first = first_of(step);
    const uint32_t *raw_v = staged.tensor(buffer, 2), *raw_grad_y = staged.tensor(buffer, 3);
    if (ahead) cp_async_wait<0>();
    __syncthreads();
    if (const Step then = ahead ? next(step) : step; then.group >= 0)
      stage_step(then, buffer ^ ahead);
    if (!ahead) {
      cp_async_wait<0>();
      __syncthreads();
    }

    Quad<E, N, kThreads> my;
    float r[kQuad][K], k[kQuad][K], w[kQuad][K], x[kQuad][K], before[K], after[K];
    my.load(w, staged.w(buffer), wide);
    my.decays(w, at.decaying(first, job.grad_final.data));
    my.share_products(shared.products);
    my.load(k, staged.tensor(buffer, 1));
    if (!step.recomputes()) {
      my.load(r, staged.tensor(buffer, 0));
      const float u[K] = {shared.u[my.key]};
      share_bonus<E, N, kThreads, K>(shared.bonus, my, r, k, u);
    }
    __syncthreads();
    my.load_products(shared.products);
    my.product(before, 0, my.quad);
    my.product(after, my.quad + 1, kQuads);
    multiply(x, k, my.after);
    if (!step.recomputes()) after[0] *= kToTf32;  // times_state reads it, otherwise advance_state
    my.store(shared.k, x, after);
    if (my.quad == 0) {
      float all[K];
      my.product(all, 0, kQuads);
      shared.total[my.key] = all[0];
    }
    if (step.recomputes()) {
      __syncthreads();
      const Share<N> of = {};
      if (of.has_values)
        advance_state<E, N>(scratch(step.chunk() + 1), state_before(step), shared.total, shared.k,
                            raw_v, of.value);
      continue;
    }
    {
      float y[kQuad][K];
      multiply(y, r, my.before);
      my.store(shared.r, y, before);
      store_levels<E, N, kThreads, K>(shared.levels, my, r, k, y, x);
    }
    bool finite = true;
#pragma unroll
    for (int t = 0; t < kQuad; t++)
      finite &= is_finite(r[t][0]) && is_finite(k[t][0]) && is_finite(my.d[t][0]);
    finite = __syncthreads_and(finite);

    float tiles[2][2][4] = {};  // dv, or dr and dk
    const Share<N> of = {};
    if (of.has_values) {
      for (int level = of.warp; level < kLevels; level += kValueWarps)
        pair_level<E, N, true>(shared.pairs, level, shared.levels[level]);
      if (threadIdx.x < kChunk)
        shared.pairs[threadIdx.x][threadIdx.x] =
            pair_operand<E>(bonus_of(shared.bonus, threadIdx.x));
      times_state<E, N>(tiles[0], shared.k, g);
      ValueTile grad_y;
      load_values<E, N>(grad_y, raw_grad_y, of.value);
      update_state<N>(g, shared.total, shared.r, grad_y);
    } else {
      meet_states<E, N>(tiles[0], tiles[1], shared.crossing, state_before(step), g_keys, raw_grad_y,
                        raw_v, of.key);
      update_key_tile<E, N>(g_keys, shared.total, shared.r, raw_grad_y, of.key);
    }
    __syncthreads();

    if (of.has_values) {
      ValueTile grad_y;
      load_values<E, N>(grad_y, raw_grad_y, of.value);
      times_values<E, N, true>(tiles[0], shared.pairs, grad_y, raw_grad_y, of.value);
      Target(job.grad_v, at, of.value)
          .template store<E>(tiles[0], int(first - at.first), at.tokens(first));
    } else {
      store_tile<N>(shared.r, tiles[0], of.key);
      store_tile<N>(shared.k, tiles[1], of.key);
      PairTile pairs;
      load_pairs<E, N>(pairs, shared.diagonal, raw_grad_y, raw_v, of.key == 0);
      if (finite) {
#pragma unroll
        for (int level = 0; level < kLevels; level++)
          level_gradient<E, N>(shared.levels[level], level, pairs, of.key);
      } else {
#pragma unroll 1
        for (int level = 0; level < kLevels; level++)
          strange_level_gradient<N>(shared.levels[level], level, pairs, of.key);
      }
    }
    __syncthreads();

    my = Quad<E, N, kThreads>();  // anew: registers are few
    Gradients gradients = {};
    my.load(w, staged.w(buffer), wide);
    my.decays(w, at.decaying(first, job.grad_final.data));
    my.load(r, staged.tensor(buffer, 0));
    my.load(k, staged.tensor(buffer, 1));
    my.load_products(shared.products);
    collect<E, N>(gradients, shared, my, r, k);
    __syncthreads();
    my.load(w, staged.w(buffer), wide);
    const float du =
        finish<E, N>(gradients, shared, my, r, k, w, at.decaying(first, job.grad_final.data));
    if (job.grad_y.data) {
      shared.du[my.quad][my.key] += du;
    } else {
#pragma unroll
      for (int t = 0; t < kQuad; t++) gradients.r[t] = 0.f;  // also where a state is NaN
    }
    const int64_t token = first + kQuad * my.quad;
    store_quad<E>(gradients.r, job.grad_r, at, token, my.key);
    store_quad<E>(gradients.k, job.grad_k, at, token, my.key);
    store_quad<E>(gradients.w, job.grad_w, at, token, my.key);
  }

  if (at.segment == 0 && Share<N>().has_values && job.grad_initial.data)
    store_state<N>(g, f32_matrix(job.grad_initial, at.m, at.h), job.grad_initial.stride_row,
                   Share<N>().value);
  __syncthreads();
  if (threadIdx.x < N) {
    float sum = 0.f;
#pragma unroll
    for (int q = 0; q < kQuads; q++) sum += shared.du[q][threadIdx.x];
    grad_u()[threadIdx.x] = sum;
  }
}

constexpr SegmentCosts kCosts = {.sharing = 0.7,
                                 .start = 160,
                                 .walk = 1.4,
                                 .scan = 16,
                                 .segment = 0.75,
                                 .multiple = kCheckpointTokens};
// With checkpoints nothing walks forwards; measured on an H100 at 16 shapes.
constexpr SegmentCosts kCostsFromKept = {.sharing = 0.5,
                                         .start = 40,
                                         .walk = 1.05,
                                         .scan = 90,
                                         .segment = 2.5,
                                         .multiple = kCheckpointTokens};

// Whether the states are there, one behind the other and aligned.
template <int N>
bool is_dense(const States& states, int64_t H) {
  return states.data && reinterpret_cast<uintptr_t>(states.data) % 16 == 0 &&
         states.stride_row == N && states.stride_h == N * N && states.stride_s == H * N * N;
}

template <class E, int N>
void run(const Launch& launch, const BackwardJob& job) {
  const Sequences& all = job.sequences;
  const auto kernel_of = [&](int buffers) {
    return Kernel{"backward_chunked", backward_chunked_kernel<E, N>, 4 * N,
                  Shared<N>::bytes(job.w.dtype == DType::f32, buffers)};
  };
  // another block on a multiprocessor hides more than a second buffer
  const int with_one = kernel_of(1).blocks_each(launch),
            with_two = kernel_of(2).blocks_each(launch);
  const int buffers = with_one > with_two ? 1 : 2;
  States kept = job.checkpoints;
  const bool given_states = is_dense<N>(kept, job.H);
  const Segments segments = segments_of(launch, all, job.H, std::max(with_one, with_two),
                                        given_states ? kCostsFromKept : kCosts);
  const int64_t blocks = segments.count * job.H;
  const Walk forwards = {Family::chunked, all,   job.H,       job.N, job.k,
                         job.v,           job.w, job.initial, false};
  const Walk backwards = {Family::chunked, all,   job.H,          job.N, job.r,
                          job.grad_y,      job.w, job.grad_final, true};
  const float *starts = nullptr, *ends = nullptr;
  if (segments.cuts(all)) ends = segment_starts<float>(launch, backwards, segments);
  if (!given_states) {
    if (segments.cuts(all)) starts = segment_starts<float>(launch, forwards, segments);
    kept = checkpoints(launch, forwards, segments, starts);
  }
  const Given given = {kept, ends, launch.workspace<float>(blocks * kGroup * N * N),
                       launch.workspace<float>(blocks * N), buffers};
  kernel_of(buffers).run(launch, blocks, job, segments, given);
  const int64_t rows = all.cu_seqlens.data ? 1 : all.count;
  sum_heads<float>(launch, given.grad_u, rows, segments.count / rows, job.H, N, job.grad_u);
}

}  // namespace

void backward_chunked(const Launch& launch, const BackwardJob& job) {
  for_chunked(job.r.dtype, job.N, [&](auto element, auto size) {
    run<decltype(element), decltype(size)::value>(launch, job);
  });
}

}  // namespace rwkv6::cuda
