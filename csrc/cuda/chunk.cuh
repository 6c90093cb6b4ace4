// What the chunked kernels share: the loop over chunks of 16 tokens, and the decays inside a chunk.
//
// With d_0 ... d_15 the decays of a chunk's tokens and
//
//   R_t     = r_t d_0 ... d_{t-1}
//   K_s     = k_s d_{s+1} ... d_15
//   A[t][s] = sum_i r_t[i] k_s[i] d_{s+1}[i] ... d_{t-1}[i]      for s < t
//
// the outputs of the chunk and the state after it are products of small matrices:
//
//   y_t = R_t S + sum_{s < t} A[t][s] v_s + (r_t . u k_t) v_t
//   S   = (d_0 ... d_15) S + sum_s K_s v_s
//
// The pairs s < t are visited level by level of a binary tree. Take the highest bit, h = 1, 2, 4 or
// 8, in which the numbers s and t differ: between the two lies a multiple of h, and at level h the
// r of t is decayed from there to t and the k of s from s to there. Decays are products of numbers
// in [0, 1] throughout: no exponent above 0, no quotient, no difference.
//
// Before the products the chunk is distributed over the threads in another way: each thread has
// four neighbouring tokens (a quad) of K neighbouring keys.
#pragma once

#include <cfloat>

#include "cuda/decay.cuh"
#include "cuda/mma.cuh"
#include "cuda/place.cuh"
#include "cuda/warp.cuh"
#include "job.h"

namespace rwkv6::cuda {

constexpr int kQuad = 4, kQuads = kChunk / kQuad, kLevels = 4;

// Rows are padded so that lanes (g, t) reach words 8 g + t, or 8 t + g, in different banks.
template <int N>
using Rows = float[kChunk][N + 8];  // [token][key]
template <int N>
constexpr int kRawRow = N / 2 + 8;  // words of a row of 16-bit elements
using Pairs = float[kChunk][20];    // [token][token]

// threadIdx.x, asked for anew: addresses made of it that are kept over a loop would take more
// registers than there are.
__device__ inline int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

struct Lane {
  int g, t;
  __device__ Lane() {
    const int thread = thread_index();
    g = thread % 32 / 4, t = thread % 4;
  }
};

// The rows of a segment, of which 16 at a time are staged: where a thread's first piece of 16 bytes
// comes from and goes to. 2 N threads copy a chunk's rows of 16 bits, or half of those of 32.
template <int N>
struct Source {
  const char* piece;  // of the segment's first chunk
  int64_t distance;   // bytes from a token's row to the next one's
  int row, to;        // in a chunk; bytes in its place

  __device__ Source(const Tokens& x, const Place& at, int thread, bool wide = false) {
    const int row_bytes = wide ? 4 * N : 2 * N, column = thread % (row_bytes / 16) * 16;
    row = thread / (row_bytes / 16);
    piece = x.row(at.span.b, at.span.begin + at.first + row, at.h) + column;
    distance = x.distance(1, 0);
    to = row * (row_bytes + 32) + column;
    if (!x.data) row = 1 << 30;  // behind all tokens: zeros
  }
  // Starts to copy the chunk that begins `offset` tokens behind the segment's first; zeros beyond
  // its `tokens`.
  template <int threads>
  __device__ void stage(uint32_t* raw, int offset, int tokens, bool wide = false) const {
    constexpr int kHalf = kChunk / 2;
    const char* from = piece + offset * distance;
    char* place = reinterpret_cast<char*>(raw) + to;
    cp_async_or_zeros(place, from, row < tokens ? 16 : 0);
    if (wide && threads == 2 * N)
      cp_async_or_zeros(place + kHalf * (4 * N + 32), from + kHalf * distance,
                        row + kHalf < tokens ? 16 : 0);
  }
};

// Where rows are staged, behind a kernel's Shared<N>: in each buffer `tensors` of 16-bit rows, then
// w, of 16 or 32 bits.
template <int N, int tensors>
struct Buffers {
  static constexpr int kTensor = kChunk * kRawRow<N>;  // words
  uint32_t* first;
  int words;  // of a buffer

  __device__ Buffers(void* memory, bool wide)
      : first(static_cast<uint32_t*>(memory)), words(bytes(wide) / 4) {}
  static constexpr __host__ __device__ int bytes(bool wide) {  // of a buffer
    return 4 * (tensors * kTensor + kChunk * (wide ? N + 8 : kRawRow<N>));
  }
  __device__ uint32_t* tensor(int buffer, int i) const {
    return first + buffer * words + i * kTensor;
  }
  __device__ uint32_t* w(int buffer) const { return tensor(buffer, tensors); }
  static_assert(kTensor * 4 % 16 == 0 && bytes(false) % 16 == 0 && bytes(true) % 16 == 0);
};

// What a thread has of a chunk: K keys from `key` on, of the quad's four tokens.
template <class E, int N, int kThreads>
struct Quad {
  static constexpr int K = N * kQuads / kThreads;
  using Values = float[kQuad][K];
  int quad, key;
  Values d;                   // decays
  Values before, after;       // their products within the quad, before and after a token
  float products[kQuads][K];  // over each quad of the chunk

  __device__ Quad() {
    const int thread = thread_index();
    quad = thread / (N / K), key = thread % (N / K) * K;
  }

  __device__ void load(Values& x, const uint32_t* raw, bool wide = false) const {
#pragma unroll
    for (int t = 0; t < kQuad; t++) {
      const int token = kQuad * quad + t;
      if (wide) {
        const float* row = reinterpret_cast<const float*>(raw) + token * (N + 8) + key;
#pragma unroll
        for (int i = 0; i < K; i++) x[t][i] = row[i];
      } else if constexpr (K == 2) {
        const uint32_t both = raw[token * kRawRow<N> + key / 2];
        x[t][0] = E::low(both), x[t][1] = E::high(both);
      } else {
        x[t][0] = E::low(reinterpret_cast<const uint16_t*>(raw + token * kRawRow<N>)[key]);
      }
    }
  }

  // The decays of the raw w, 1 for tokens from `tokens` on.
  __device__ void decays(const Values& w, int tokens) {
#pragma unroll
    for (int i = 0; i < K; i++) {
#pragma unroll
      for (int t = 0; t < kQuad; t++) d[t][i] = kQuad * quad + t < tokens ? decay(w[t][i]) : 1.f;
      before[0][i] = after[kQuad - 1][i] = 1.f;
#pragma unroll
      for (int t = 1; t < kQuad; t++) {
        before[t][i] = before[t - 1][i] * d[t - 1][i];
        after[kQuad - 1 - t][i] = after[kQuad - t][i] * d[kQuad - t][i];
      }
    }
  }

  __device__ void share_products(float (*shared)[N]) const {
#pragma unroll
    for (int i = 0; i < K; i++) shared[quad][key + i] = before[kQuad - 1][i] * d[kQuad - 1][i];
  }
  // The products of all quads, when all threads have shared theirs.
  __device__ void load_products(const float (*shared)[N]) {
#pragma unroll
    for (int q = 0; q < kQuads; q++)
#pragma unroll
      for (int i = 0; i < K; i++) products[q][i] = shared[q][key + i];
  }
  // Their product over the quads [first, last).
  __device__ void product(float (&x)[K], int first, int last) const {
#pragma unroll
    for (int i = 0; i < K; i++) {
      x[i] = 1.f;
#pragma unroll
      for (int q = 0; q < kQuads; q++) x[i] *= first <= q && q < last ? products[q][i] : 1.f;
    }
  }
  // What lies between the quad and the middle of the chunk.
  __device__ void outer_scale(float (&x)[K]) const {
#pragma unroll
    for (int i = 0; i < K; i++)
      x[i] = quad == 0 ? products[1][i] : quad == 3 ? products[2][i] : 1.f;
  }

  // rows[token][key] = x
  __device__ void store(Rows<N>& rows, const Values& x) const {
#pragma unroll
    for (int t = 0; t < kQuad; t++) {
      float* to = &rows[kQuad * quad + t][key];
      if constexpr (K == 2)
        *reinterpret_cast<float2*>(to) = {x[t][0], x[t][1]};
      else
        *to = x[t][0];
    }
  }
  // rows[token][key] = x scale
  __device__ void store(Rows<N>& rows, const Values& x, const float (&scale)[K]) const {
    Values scaled;
#pragma unroll
    for (int t = 0; t < kQuad; t++)
#pragma unroll
      for (int i = 0; i < K; i++) scaled[t][i] = x[t][i] * scale[i];
    store(rows, scaled);
  }
  // The same, to be read as operands of one TF32 each.
  __device__ void store_tf32(Rows<N>& rows, const Values& x, const float (&scale)[K]) const {
    float rounding[K];
#pragma unroll
    for (int i = 0; i < K; i++) rounding[i] = scale[i] * kToTf32;
    store(rows, x, rounding);
  }
};

// out = x y, element by element
template <int K>
__device__ inline void multiply(float (&out)[kQuad][K], const float (&x)[kQuad][K],
                                const float (&y)[kQuad][K]) {
#pragma unroll
  for (int t = 0; t < kQuad; t++)
#pragma unroll
    for (int i = 0; i < K; i++) out[t][i] = x[t][i] * y[t][i];
}

// Sums x[0..3] over `width` lanes; lane l gets that of x[l % 4]. Always in the same order.
template <int width>
__device__ inline float sum_four(const float (&x)[kQuad]) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  const bool odd = lane & 1, upper = lane & 2;
  const float first = (odd ? x[1] : x[0]) + __shfl_xor_sync(kAll, odd ? x[0] : x[1], 1);
  const float second = (odd ? x[3] : x[2]) + __shfl_xor_sync(kAll, odd ? x[2] : x[3], 1);
  float sum = (upper ? second : first) + __shfl_xor_sync(kAll, upper ? first : second, 2);
#pragma unroll
  for (int step = 4; step < width; step *= 2) sum += __shfl_xor_sync(kAll, sum, step);
  return sum;
}

template <class E, int K>
__device__ inline void load_u(float (&u)[K], const Heads& from, int64_t h, int64_t b, int key) {
  const char* row = from.row(h, b);
#pragma unroll
  for (int i = 0; i < K; i++)
    u[i] = !from.data                 ? 0.f
           : from.dtype == DType::f32 ? reinterpret_cast<const float*>(row)[key + i]
                                      : E::low(reinterpret_cast<const uint16_t*>(row)[key + i]);
}

// The bonus r_t . u k_t of the chunk's tokens: partial sums by warp, then `bonus_of` adds them up.
template <int N, int K>
constexpr int kBonusParts = N / K > 32 ? N / K / 32 : 1;
template <int N, int K>
using Bonus = float[kBonusParts<N, K>][kChunk];

template <class E, int N, int kThreads, int K>
__device__ inline void share_bonus(Bonus<N, K>& bonus, const Quad<E, N, kThreads>& my,
                                   const float (&r)[kQuad][K], const float (&k)[kQuad][K],
                                   const float (&u)[K]) {
  float terms[kQuad];
#pragma unroll
  for (int t = 0; t < kQuad; t++) {
    terms[t] = 0.f;
#pragma unroll
    for (int i = 0; i < K; i++) terms[t] += r[t][i] * (u[i] * k[t][i]);
  }
  constexpr int kWidth = N / K < 32 ? N / K : 32;
  const float sum = sum_four<kWidth>(terms);
  const int lane = my.key / K % kWidth;
  if (lane < kQuad) bonus[my.key / K / kWidth][kQuad * my.quad + lane] = sum;
}
template <int parts>
__device__ inline float bonus_of(const float (&bonus)[parts][kChunk], int token) {
  float sum = bonus[0][token];
#pragma unroll
  for (int p = 1; p < parts; p++) sum += bonus[p][token];
  return sum;
}

// The rows of the four levels: r behind each level's boundaries, k before them. `from_before` is r
// times my.before, `to_after` k times my.after.
template <class E, int N, int kThreads, int K>
__device__ inline void store_levels(Rows<N> (&levels)[kLevels], const Quad<E, N, kThreads>& my,
                                    const float (&r)[kQuad][K], const float (&k)[kQuad][K],
                                    const float (&from_before)[kQuad][K],
                                    const float (&to_after)[kQuad][K]) {
  float x[kQuad][K], scale[K];
#pragma unroll
  for (int i = 0; i < K; i++)  // neighbours: nothing between them
    x[0][i] = k[0][i], x[1][i] = r[1][i], x[2][i] = k[2][i], x[3][i] = r[3][i];
  my.store(levels[0], x);
  my.product(scale, 0, 0);  // 1
#pragma unroll
  for (int i = 0; i < K; i++)  // the halves of the quad
    x[0][i] = k[0][i] * my.d[1][i], x[1][i] = k[1][i], x[2][i] = r[2][i],
    x[3][i] = r[3][i] * my.d[2][i];
  my.store_tf32(levels[1], x, scale);
  // a quad before its boundary has k to that, one behind it r from there
  const auto choose = [&](bool behind) {
#pragma unroll
    for (int t = 0; t < kQuad; t++)
#pragma unroll
      for (int i = 0; i < K; i++) x[t][i] = behind ? from_before[t][i] : to_after[t][i];
  };
  choose(my.quad % 2);
  my.store_tf32(levels[2], x, scale);  // neighbouring quads
  my.outer_scale(scale);
  choose(my.quad / 2);
  my.store_tf32(levels[3], x, scale);  // the halves of the chunk
}

// A warp's 16 values of the state of all keys, as mma accumulators: transposed, the rows g and g +
// 8 being the warp's values 2g and 2g + 1. [j] = keys 8j + 2t and 8j + 2t + 1 of the one value,
// then of the other. The same registers are the right operand of a product over keys.
template <int N>
using StateTile = float[N / 8][4];

// Keys 8j to 8j + 7 and all of them; `state` is [key][value] with `stride` elements from key to
// key, value is the warp's first.
__device__ inline void load_keys(float (&s)[4], int j, const float* state, int64_t stride,
                                 int value) {
  const Lane lane;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float* from = state + (8 * j + 2 * lane.t + e) * stride + value + 2 * lane.g;
    s[e] = from[0], s[e + 2] = from[1];
  }
}
__device__ inline void store_keys(const float (&s)[4], int j, float* state, int64_t stride,
                                  int value) {
  const Lane lane;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    float* to = state + (8 * j + 2 * lane.t + e) * stride + value + 2 * lane.g;
    to[0] = s[e], to[1] = s[e + 2];
  }
}
template <int N>
__device__ inline void load_state(StateTile<N>& s, const float* state, int64_t stride, int value) {
#pragma unroll
  for (int j = 0; j < N / 8; j++) load_keys(s[j], j, state, stride, value);
}
template <int N>
__device__ inline void store_state(const StateTile<N>& s, float* state, int64_t stride, int value) {
#pragma unroll
  for (int j = 0; j < N / 8; j++) store_keys(s[j], j, state, stride, value);
}
template <int N>
__device__ inline void fill_state(StateTile<N>& s, float x) {
#pragma unroll
  for (int j = 0; j < N / 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[j][e] = x;
}
// Row `row` of `states`, f32 or E; absent, or row -1: zeros.
template <class E, int N>
__device__ inline void load_state(StateTile<N>& s, const States& states, int64_t row, int64_t h,
                                  int value) {
  if (!states.data || row < 0) return fill_state<N>(s, 0.f);
  const char* state = states.matrix(row, h);
  if (states.dtype == DType::f32)
    return load_state<N>(s, reinterpret_cast<const float*>(state), states.stride_row, value);
  const Lane lane;
  const uint16_t* from = reinterpret_cast<const uint16_t*>(state) + value + 2 * lane.g;
#pragma unroll
  for (int j = 0; j < N / 8; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const uint16_t* two = from + (8 * j + 2 * lane.t + e) * states.stride_row;
      s[j][e] = E::low(two[0]), s[j][e + 2] = E::low(two[1]);
    }
}
__device__ inline float* f32_matrix(const States& states, int64_t row, int64_t h) {
  return reinterpret_cast<float*>(states.matrix(row, h));
}
// Keeps the state before a token of the sequence if that is a checkpoint.
template <int N>
__device__ inline void store_checkpoint(const StateTile<N>& s, const States& checkpoints,
                                        const Sequences& sequences, const Place& at, int64_t token,
                                        int value) {
  if (!checkpoints.data || token == 0 || token % kCheckpointTokens) return;
  const int64_t row = sequences.checkpoint(at.span.b, at.span.begin, token);
  store_state<N>(s, f32_matrix(checkpoints, row, at.h), checkpoints.stride_row, value);
}
// All of an f32 state, by the whole block.
template <int N>
__device__ inline void fill_matrix(float* state, int64_t stride, float x) {
  for (int i = threadIdx.x; i < N * N; i += blockDim.x) state[i / N * stride + i % N] = x;
}

// A chunk's rows of the warp's 16 values, v or grad_y, in the order of StateTile: the left operand
// of a product over tokens, transposed, and with [e] and [e + 2] the right one for value 2g + e.
using ValueTile = uint32_t[2][4];
template <class E, int N>
__device__ inline void load_values(ValueTile& v, const uint32_t* raw, int value) {
  const Lane lane;
#pragma unroll
  for (int step = 0; step < 2; step++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const uint32_t both = raw[(8 * step + lane.t + 4 * e) * kRawRow<N> + value / 2 + lane.g];
      v[step][2 * e] = __float_as_uint(E::low(both));
      v[step][2 * e + 1] = __float_as_uint(E::high(both));
    }
}

// S <- total S + sum_t rows[t] v_t, for keys 8j to 8j + 7 and for all. The sum has 22 bits of the
// rows, and meets the state in f32: mma's own sums are rounded towards zero, which would add up.
template <int N>
__device__ inline void update_keys(float (&s)[4], int j, const float (&total)[N],
                                   const Rows<N>& rows, const ValueTile& v) {
  const Lane lane;
  float added[4] = {};
#pragma unroll
  for (int step = 0; step < 2; step++) {
    const float* column = &rows[8 * step + lane.t][8 * j + lane.g];
    const TwoTf32 upper(column[0]), lower(column[4 * (N + 8)]);
    mma(added, v[step], upper.low, lower.low);
    mma(added, v[step], upper.high, lower.high);
  }
  const float2 d = *reinterpret_cast<const float2*>(&total[8 * j + 2 * lane.t]);
#pragma unroll
  for (int i = 0; i < 4; i++) s[i] = fmaf(i % 2 ? d.y : d.x, s[i], added[i]);
}
template <int N>
__device__ inline void update_state(StateTile<N>& s, const float (&total)[N], const Rows<N>& rows,
                                    const ValueTile& v) {
#pragma unroll
  for (int j = 0; j < N / 8; j++) update_keys<N>(s[j], j, total, rows, v);
}

// y[16 tokens][16 values] of a warp: accumulators for value 2g + e of column g.
using OutputTile = float[2][4];

// y += rows S
template <class E, int N>
__device__ inline void times_state(OutputTile& y, const Rows<N>& rows, const StateTile<N>& s) {
  const Lane lane;
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    const int key = 8 * j + 2 * lane.t;
    const uint2 upper = *reinterpret_cast<const uint2*>(&rows[lane.g][key]);
    const uint2 lower = *reinterpret_cast<const uint2*>(&rows[lane.g + 8][key]);
    const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const float upper = s[j][2 * e], lower = s[j][2 * e + 1];
      if constexpr (E::kFine) {
        mma(y[e], a, TwoTf32(upper).low, TwoTf32(lower).low);
        mma(y[e], a, TwoTf32(upper).high, TwoTf32(lower).high);
      } else {
        mma(y[e], a, tf32(upper), tf32(lower));
      }
    }
  }
}

__device__ inline bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }

// Whether a pair's first index is that of an output which the second contributes to: of y_t token s
// <= t, transposed of dv_s token t >= s.
template <bool transposed>
__device__ inline bool contributes(int row, int column) {
  return transposed ? column >= row : column <= row;
}

// y += pairs v, where a value is NaN or infinite: zero times that would be NaN.
template <class E, int N, bool transposed>
__device__ inline void times_strange_values(OutputTile& y, const Pairs& pairs, const uint32_t* raw,
                                            int value) {
  const Lane lane;
#pragma unroll 1
  for (int column = 0; column < kChunk; column++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t both = raw[column * kRawRow<N> + value / 2 + 2 * lane.t + i];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = lane.g + 8 * half;
        if (!contributes<transposed>(row, column)) continue;
        y[0][2 * half + i] += pairs[row][column] * E::low(both);
        y[1][2 * half + i] += pairs[row][column] * E::high(both);
      }
    }
}

// y += pairs v; v are the warp's 16 values, from `value` on, of the raw rows.
template <class E, int N, bool transposed>
__device__ inline void times_values(OutputTile& y, const Pairs& pairs, const ValueTile& v,
                                    const uint32_t* raw, int value) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 8; i++) finite &= is_finite(__uint_as_float(v[i / 4][i % 4]));
  if (!__all_sync(kAllLanes, finite))
    return times_strange_values<E, N, transposed>(y, pairs, raw, value);
  const Lane lane;
#pragma unroll
  for (int step = 0; step < 2; step++) {
    float a[4];
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = lane.g + i % 2 * 8, column = 8 * step + lane.t + i / 2 * 4;
      a[i] = contributes<transposed>(row, column) ? pairs[row][column] : 0.f;
      high[i] = __float_as_uint(a[i]), low[i] = TwoTf32(a[i]).low;
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
      if (E::kFine) mma(y[e], low, v[step][e], v[step][e + 2]);
      mma(y[e], high, v[step][e], v[step][e + 2]);
    }
  }
}

// Where a warp's [16 tokens][16 values] of a segment's outputs go; its lanes hold values 4t to 4t + 3
// of tokens g and g + 8.
struct Target {
  char* four;        // of the segment's first chunk
  int64_t distance;  // bytes from a token's row to the next one's

  __device__ Target(const Tokens& x, const Place& at, int value) {
    const Lane lane;
    four = x.row(at.span.b, at.span.begin + at.first + lane.g, at.h) + 2 * (value + 4 * lane.t);
    distance = x.distance(1, 0);
  }
  template <class E>
  __device__ void store(const OutputTile& y, int offset, int tokens) const {
    const Lane lane;
    char* place = four + offset * distance;
#pragma unroll
    for (int half = 0; half < 2; half++, place += 8 * distance)
      if (lane.g + 8 * half < tokens)
        *reinterpret_cast<uint2*>(place) = {E::pack(y[0][2 * half], y[1][2 * half]),
                                            E::pack(y[0][2 * half + 1], y[1][2 * half + 1])};
  }
};

// A pair's product, to be read by times_values.
template <class E>
__device__ inline float pair_operand(float x) {
  return E::kFine ? x : x * kToTf32;
}

// One level's A[t][s]: pairs[t][s], or transposed pairs[s][t]. One warp.
template <class E, int N, bool transposed>
__device__ inline void pair_level(Pairs& pairs, int level, const Rows<N>& rows) {
  const Lane lane;
  const int bit = 1 << level;
  // the g-th token behind a boundary of this level, and the one as far before it
  const auto behind = [bit](int g) { return (g & ~(bit - 1)) << 1 | bit | (g & (bit - 1)); };
  const int row = behind(lane.g);
  float a[4] = {};
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    const int key = 8 * j + 2 * lane.t;
    const uint2 r = *reinterpret_cast<const uint2*>(&rows[row][key]);
    const uint2 k = *reinterpret_cast<const uint2*>(&rows[row ^ bit][key]);
    const uint32_t left[4] = {r.x, 0, r.y, 0};
    mma(a, left, k.x, k.y);
  }
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int column = 2 * lane.t + e;
    if ((lane.g ^ column) >= bit) continue;  // another boundary's
    const int token = behind(column) ^ bit;
    (transposed ? pairs[token][row] : pairs[row][token]) = pair_operand<E>(a[e]);
  }
}

// Fills the segment's rows of an output: 16-bit or f32, with zeros or NaN.
template <int N>
__device__ inline void fill_rows(const Tokens& to, const Place& at, bool nan = true) {
  const int words = to.dtype == DType::f32 ? N : N / 2;
  const uint32_t filling = nan ? 0x7fff7fffu : 0;  // a NaN of each dtype
  for (int64_t i = threadIdx.x; i < (at.last - at.first) * words; i += blockDim.x) {
    char* row = to.row(at.span.b, at.span.begin + at.first + i / words, at.h);
    reinterpret_cast<uint32_t*>(row)[i % words] = filling;
  }
}

}  // namespace rwkv6::cuda
