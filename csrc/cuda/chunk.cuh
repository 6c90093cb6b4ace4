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

#include "cuda/mma.cuh"
#include "cuda/segments.h"
#include "cuda/span.cuh"
#include "job.h"

namespace rwkv6::cuda {

constexpr int kQuad = 4, kQuads = kChunk / kQuad, kLevels = 4;

// Rows are padded so that lanes (g, t) reach words 8 g + t, or 8 t + g, in different banks.
template <int N>
using Rows = float[kChunk][N + 8];  // [token][key]
template <int N>
constexpr int kRawRow = N / 2 + 8;  // words of a row of 16-bit elements
using Pairs = float[kChunk][20];    // [token][token]

// One of a sequence's segments, walked by one block.
struct Place {
  int64_t unit;         // of (sequence, head)
  int64_t m, h;         // sequence, head
  int64_t segment;      // in the sequence
  Span span;            // the sequence
  int64_t first, last;  // the segment's tokens, in the sequence

  __device__ Place(const Sequences& sequences, const Segments& segments, int64_t H) {
    unit = blockIdx.x / segments.count, segment = blockIdx.x % segments.count;
    m = unit / H, h = unit % H;
    span = span_of(sequences, m);
    first = min(segment * segments.length, span.length);
    last = min(first + segments.length, span.length);
  }
  // The segment of the sequence's last token, which the final state belongs to.
  __device__ bool is_end() const { return last == span.length && (segment == 0 || first < last); }
};

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

// Starts to copy 16 rows of x, tokens from `first` on, to shared memory; zeros beyond the end.
template <int N, int kThreads, int element_bytes = 2>
__device__ inline void stage(uint32_t* raw, const Tokens& x, const Place& at, int64_t first) {
  constexpr int kRowBytes = N * element_bytes, kPieces = kRowBytes / 16, kAll = kChunk * kPieces;
  const char* rows = x.row(at.span.b, at.span.begin + first, at.h);
  const int64_t distance = x.distance(1, 0);
  const int tokens = int(min(at.last - first, int64_t(kChunk)));
#pragma unroll
  for (int begin = 0; begin < kAll; begin += kThreads) {
    const int piece = begin + threadIdx.x;
    if (kAll % kThreads && piece >= kAll) break;
    const int row = piece / kPieces, column = piece % kPieces * 16;
    char* to = reinterpret_cast<char*>(raw) + row * (kRowBytes + 32) + column;
    if (x.data && row < tokens)
      copy_async(to, rows + row * distance + column);
    else
      *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
  }
}
template <int N, int kThreads>
__device__ inline void stage_w(uint32_t* raw, const Tokens& w, const Place& at, int64_t first) {
  if (w.dtype == DType::f32)
    stage<N, kThreads, 4>(raw, w, at, first);
  else
    stage<N, kThreads>(raw, w, at, first);
}

// exp(-exp(w)); in base 2, and exactly 1 where exp(w) is too small to tell.
__device__ inline float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
constexpr float kLog2E = 1.44269504088896340736f;
__device__ inline float decay(float w) { return power_of_2(-kLog2E * power_of_2(kLog2E * w)); }

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

  // rows[token][key] = x scale, as mma operand
  __device__ void store(Rows<N>& rows, const Values& x, const float (&scale)[K]) const {
#pragma unroll
    for (int t = 0; t < kQuad; t++) {
      uint32_t* to = reinterpret_cast<uint32_t*>(&rows[kQuad * quad + t][key]);
      if constexpr (K == 2)
        *reinterpret_cast<uint2*>(to) = {tf32(x[t][0] * scale[0]), tf32(x[t][1] * scale[1])};
      else
        *to = tf32(x[t][0] * scale[0]);
    }
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
    u[i] = from.dtype == DType::f32 ? reinterpret_cast<const float*>(row)[key + i]
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
  my.product(scale, 0, 0);  // 1
#pragma unroll
  for (int i = 0; i < K; i++)  // neighbours: nothing between them
    x[0][i] = k[0][i], x[1][i] = r[1][i], x[2][i] = k[2][i], x[3][i] = r[3][i];
  my.store(levels[0], x, scale);
#pragma unroll
  for (int i = 0; i < K; i++)  // the halves of the quad
    x[0][i] = k[0][i] * my.d[1][i], x[1][i] = k[1][i], x[2][i] = r[2][i],
    x[3][i] = r[3][i] * my.d[2][i];
  my.store(levels[1], x, scale);
  // a quad before its boundary has k to that, one behind it r from there
  const auto choose = [&](bool behind) {
#pragma unroll
    for (int t = 0; t < kQuad; t++)
#pragma unroll
      for (int i = 0; i < K; i++) x[t][i] = behind ? from_before[t][i] : to_after[t][i];
  };
  choose(my.quad % 2);
  my.store(levels[2], x, scale);  // neighbouring quads
  my.outer_scale(scale);
  choose(my.quad / 2);
  my.store(levels[3], x, scale);  // the halves of the chunk
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

// S <- total S + sum_t rows[t] v_t, for keys 8j to 8j + 7 and for all.
template <int N>
__device__ inline void update_keys(float (&s)[4], int j, const float (&total)[N],
                                   const Rows<N>& rows, const ValueTile& v) {
  const Lane lane;
  const float2 d = *reinterpret_cast<const float2*>(&total[8 * j + 2 * lane.t]);
  s[0] *= d.x, s[1] *= d.y, s[2] *= d.x, s[3] *= d.y;
#pragma unroll
  for (int step = 0; step < 2; step++) {
    const float* column = &rows[8 * step + lane.t][8 * j + lane.g];
    mma(s, v[step], __float_as_uint(column[0]), __float_as_uint(column[4 * (N + 8)]));
  }
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
template <int N>
__device__ inline void times_state(OutputTile& y, const Rows<N>& rows, const StateTile<N>& s) {
  const Lane lane;
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    const int key = 8 * j + 2 * lane.t;
    const uint2 upper = *reinterpret_cast<const uint2*>(&rows[lane.g][key]);
    const uint2 lower = *reinterpret_cast<const uint2*>(&rows[lane.g + 8][key]);
    const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
    mma(y[0], a, tf32(s[j][0]), tf32(s[j][1]));
    mma(y[1], a, tf32(s[j][2]), tf32(s[j][3]));
  }
}

// y += pairs v
__device__ inline void times_values(OutputTile& y, const Pairs& pairs, const ValueTile& v) {
  const Lane lane;
#pragma unroll
  for (int step = 0; step < 2; step++) {
    const float* upper = &pairs[lane.g][8 * step + lane.t];
    const float* lower = &pairs[lane.g + 8][8 * step + lane.t];
    const uint32_t a[4] = {__float_as_uint(upper[0]), __float_as_uint(lower[0]),
                           __float_as_uint(upper[4]), __float_as_uint(lower[4])};
    mma(y[0], a, v[step][0], v[step][2]);
    mma(y[1], a, v[step][1], v[step][3]);
  }
}

// Stores a warp's [16 tokens][16 values]; its lanes hold values 4t to 4t + 3 of tokens g and g + 8.
template <class E>
__device__ inline void store_output(const OutputTile& y, const Tokens& to, const Place& at,
                                    int64_t first, int value) {
  const Lane lane;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t token = first + lane.g + 8 * half;
    if (token >= at.last) continue;
    char* row = to.row(at.span.b, at.span.begin + token, at.h);
    *reinterpret_cast<uint2*>(row + 2 * (value + 4 * lane.t)) = {
        E::pack(y[0][2 * half], y[1][2 * half]), E::pack(y[0][2 * half + 1], y[1][2 * half + 1])};
  }
}

// One level's A[t][s]: pairs[t][s], or transposed pairs[s][t]. One warp.
template <int N, bool transposed>
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
    (transposed ? pairs[token][row] : pairs[row][token]) = __uint_as_float(tf32(a[e]));
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
