// WKV6 backward on ordinary arithmetic units: every dtype and head size, f32 in f32.
//
// The formulas stand at the head of cpu/wkv_backward.h. A chunk has C tokens, S is the state before
// it and G the gradient of the state after it. Seen from inside, with F_t the product of the decays
// of the chunk before t and B_s the product of those after s,
//   dr_t = F_t (S dy_t) + sum_{s<t} D(s, t) k_s (v_s . dy_t) + ...     D(s, t) = d_{s+1} .. d_{t-1}
//   dk_s = B_s (G v_s) + sum_{t>s} D(s, t) r_t (v_s . dy_t) + ...
//   dv_s = G^T (B_s k_s) + sum_{t>=s} A[t][s] dy_t                     A[t][s] = sum_i r_t D(s, t)
//   k_s
// and q_a is the sum over all pairs of a source (S or a token) before a and a target (a token or G)
// after a. Only products of decays in [0, 1] and sums of what belongs together, no differences.
//
// The walk there leaves the state before every chunk in the workspace, the walk back meets it. A
// warp owns some keys with all columns, so that what is summed over columns, the gradients of r, k,
// w and u, stays within the warp; what is summed over keys, A and dv, is added up through shared
// memory. Keys of a head that one block does not hold are other blocks', with a dv of their own
// that sum_parts adds up. Head sizes are padded to 32, 64, 128 or 256 by zeros.
#include "cuda/decay.cuh"
#include "cuda/launch.h"
#include "cuda/load.cuh"
#include "cuda/span.cuh"
#include "cuda/warp.cuh"

namespace rwkv6::cuda {
namespace {

template <class T, int P>
struct Shape {
  static constexpr int kPack = Pack<T>::kSize;
  static constexpr int kChunk = 64 / sizeof(T);          // tokens
  static constexpr int kKeys = kPack;                    // of a thread
  static constexpr int kColumns = P < 64 ? 8 : 16;       // of a thread
  static constexpr int kColumnPacks = kColumns / kPack;  // of a thread
  static constexpr int kColumnLanes = P / kColumns;
  static constexpr int kKeyLanes = 32 / kColumnLanes;
  static constexpr int kWarpKeys = kKeyLanes * kKeys;
  static constexpr int kMaxWarps = P / kWarpKeys < 8 ? P / kWarpKeys : 8;  // of a block
  static constexpr int kBlockKeys = kMaxWarps * kWarpKeys;
  static constexpr int kRowPacks = P / kPack;
  static constexpr int kGroup = P * sizeof(T) > 1024 ? 1 : 2;  // tokens whose dv is summed at once
  static constexpr int kStatePacks = kKeys * kColumnPacks * 32;  // of a warp
};

// What a block shares on the walk there: keys and decays of its own, all values.
template <class T, int P>
struct Forward {
  typedef Shape<T, P> Shape;
  Pack<T> k[Shape::kChunk][Shape::kBlockKeys / Shape::kPack];
  Pack<T> w[Shape::kChunk][Shape::kBlockKeys / Shape::kPack];  // then the decay
  Pack<T> v[Shape::kChunk][Shape::kRowPacks];
};

// What a block shares on the walk back.
template <class T, int P>
struct Backward {
  typedef Shape<T, P> Shape;
  static constexpr int C = Shape::kChunk;
  // Of the keys of the block.
  Pack<T> r[C][Shape::kBlockKeys / Shape::kPack];
  Pack<T> k[C][Shape::kBlockKeys / Shape::kPack];
  Pack<T> w[C][Shape::kBlockKeys / Shape::kPack];   // then the decay's rate
  Pack<T> fr[C][Shape::kBlockKeys / Shape::kPack];  // F_t r_t, then S dy_t
  Pack<T> bk[C][Shape::kBlockKeys / Shape::kPack];  // B_t k_t, then G v_t
  T all[Shape::kBlockKeys];                         // product of the chunk's decays
  T meeting[Shape::kBlockKeys];                     // sum_j S G
  // Of all columns; a pack more than needed, so that columns of these differ in their banks.
  Pack<T> v[C][Shape::kRowPacks + 1];  // then G^T (B_t k_t)
  Pack<T> grad_y[C][Shape::kRowPacks + 1];
  Pack<T> partial[2][Shape::kMaxWarps][Shape::kGroup][Shape::kRowPacks];
  T M[C][C];  // [t][s]: dy_t . v_s
  T A[C][C];  // [t][s]
  T A_parts[Shape::kMaxWarps][C][C];
};

// Which packs of N elements can be read and written at once.
struct Whole {
  bool grad_y, r, k, v, w, initial, grad_final;
  bool grad_r, grad_k, grad_v, grad_w, grad_initial;
};

struct Workspace {
  void* states;    // [chunks, parts, warps, kStatePacks] packs: S before every chunk
  void* grad_v;    // [parts, B T, H, N]: grad_v if there is more than one part
  void* grad_u;    // [count, H, N]
  int64_t chunks;  // of a batch row; with cu_seqlens of all
  int64_t tokens;  // B T
};

template <class T>
__device__ T& element(Pack<T>* row, int i) {
  return row[i / Pack<T>::kSize].x[i % Pack<T>::kSize];
}

// Starts to copy the rows of a chunk: `count` elements from `from` on of each of `tokens` tokens.
template <class T, int packs, int pitch>
__device__ void fetch_rows(Pack<T> (*rows)[pitch], const Tokens& x, const Span& span, int64_t h,
                           int64_t begin, int tokens, int64_t from, int64_t count, bool whole) {
  if (!x.data) return;
  for (int at = threadIdx.x; at < tokens * packs; at += blockDim.x) {
    const int t = at / packs, p = at % packs;
    const int64_t i = p * Pack<T>::kSize;
    fetch_pack(&rows[t][p],
               x.row(span.b, span.begin + begin + t, h) + (from + i) * size_of(x.dtype), x.dtype,
               count - i, whole);
  }
}

// What this thread has fetched by fetch_rows, in its place; zeros where there is nothing.
template <class T, int packs, int pitch, class Change>
__device__ void unpack_rows(Pack<T> (*rows)[pitch], const Tokens& x, int tokens, int chunk,
                            int64_t count, const Change& change) {
  for (int at = threadIdx.x; at < chunk * packs; at += blockDim.x) {
    const int t = at / packs, p = at % packs;
    const bool there = x.data && t < tokens;
    Pack<T> pack = there ? unpack(&rows[t][p], x.dtype, count - p * Pack<T>::kSize) : zeros<T>();
    if (there) {
#pragma unroll
      for (int e = 0; e < Pack<T>::kSize; e++) pack.x[e] = change(pack.x[e]);
    }
    rows[t][p] = pack;
  }
}

template <class T, int packs, int pitch>
__device__ void store_rows(const Pack<T> (*rows)[pitch], const Tokens& x, const Span& span,
                           int64_t h, int64_t begin, int tokens, int64_t from, int64_t count,
                           bool whole) {
  for (int at = threadIdx.x; at < tokens * packs; at += blockDim.x) {
    const int t = at / packs, p = at % packs;
    const int64_t i = p * Pack<T>::kSize;
    store_pack(x.row(span.b, span.begin + begin + t, h) + (from + i) * size_of(x.dtype), x.dtype,
               rows[t][p], count - i, whole);
  }
}

template <class T, int P>
__global__ void __launch_bounds__(Shape<T, P>::kMaxWarps * 32)
    backward_recurrent_kernel(BackwardJob job, int64_t parts, Whole whole, Workspace workspace) {
  typedef Shape<T, P> Shape;
  constexpr int C = Shape::kChunk;
  constexpr int kPack = Shape::kPack;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kColumnPacks = Shape::kColumnPacks;
  constexpr int kKeyPacks = Shape::kBlockKeys / kPack;
  extern __shared__ __align__(16) char shared[];
  Forward<T, P>& there = *reinterpret_cast<Forward<T, P>*>(shared);
  Backward<T, P>& back = *reinterpret_cast<Backward<T, P>*>(shared);

  const int64_t part = blockIdx.x % parts;
  const int64_t head = blockIdx.x / parts;
  const int64_t h = head % job.H, m = head / job.H;
  const int64_t N = job.N;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column_lane = lane % Shape::kColumnLanes, key_lane = lane / Shape::kColumnLanes;
  const int block_keys = warps * Shape::kWarpKeys;
  const int64_t block_key = part * block_keys;              // the first one
  const int warp_key = warp * Shape::kWarpKeys;             // the first one, within the block
  const int thread_key = warp_key + key_lane * kKeys;       // likewise
  const int lane_key = warp_key + lane % Shape::kWarpKeys;  // a key of the lane's own
  const bool lane_owns = lane < Shape::kWarpKeys && block_key + lane_key < N;
  const Span span = span_of(job.sequences, m);
  T* grad_u = static_cast<T*>(workspace.grad_u) + head * N;
  T* grad_initial = reinterpret_cast<T*>(job.grad_initial.matrix(m, h));
  // dv goes straight to its place if nothing has to be added to it.
  Tokens grad_v = job.grad_v;
  if (parts > 1) {
    grad_v.data = static_cast<char*>(workspace.grad_v) +
                  part * workspace.tokens * job.H * N * int64_t(sizeof(T));
    grad_v.dtype = sizeof(T) == 8 ? DType::f64 : DType::f32;
    grad_v.stride_h = N;
    grad_v.stride_t = job.H * N;
    grad_v.stride_b = job.sequences.tokens * job.H * N;
  }

  if (!span.valid) {
    for (int64_t i = threadIdx.x; i < N; i += blockDim.x) {
      const bool own = i >= block_key && i < block_key + block_keys;
      for (int64_t token = span.begin; token < span.begin + span.length; token++) {
        store_element(grad_v.row(span.b, token, h), grad_v.dtype, i, T(NAN));
        if (!own) continue;
        store_element(job.grad_r.row(span.b, token, h), job.grad_r.dtype, i, T(NAN));
        store_element(job.grad_k.row(span.b, token, h), job.grad_k.dtype, i, T(NAN));
        store_element(job.grad_w.row(span.b, token, h), job.grad_w.dtype, i, T(NAN));
      }
      if (own) grad_u[i] = T(NAN);
      if (grad_initial)
        for (int64_t key = block_key; key < N && key < block_key + block_keys; key++)
          grad_initial[key * job.grad_initial.stride_row + i] = T(NAN);
    }
    return;
  }

  const auto column = [&](int p) { return int64_t(p * Shape::kColumnLanes + column_lane) * kPack; };
  const int64_t chunks = (span.length + C - 1) / C;
  const int64_t first_chunk =
      job.sequences.cu_seqlens.data ? span.begin / C + m : m * workspace.chunks;
  const int64_t all_chunks =
      job.sequences.cu_seqlens.data ? workspace.chunks : workspace.chunks * job.sequences.count;
  // The lane's packs of the state before a chunk lie 32 packs apart.
  const auto checkpoint = [&](int64_t chunk) {
    const int64_t at = ((h * all_chunks + first_chunk + chunk) * parts + part) * warps + warp;
    return static_cast<Pack<T>*>(workspace.states) + at * Shape::kStatePacks + lane;
  };
  const auto load_state = [&](const States& from, int64_t row, bool whole,
                              T(&to)[kKeys][Shape::kColumns]) {
    const char* matrix = from.data && row >= 0 ? from.matrix(row, h) : nullptr;
#pragma unroll
    for (int a = 0; a < kKeys; a++)
#pragma unroll
      for (int p = 0; p < kColumnPacks; p++) {
        const int64_t i = block_key + thread_key + a, j = column(p);
        const Pack<T> pack =
            matrix && i < N ? load_pack<T>(matrix + (i * from.stride_row + j) * size_of(from.dtype),
                                           from.dtype, N - j, whole)
                            : zeros<T>();
#pragma unroll
        for (int c = 0; c < kPack; c++) to[a][p * kPack + c] = pack.x[c];
      }
  };
  const auto as_it_is = [](T x) { return x; };
  const int64_t keys_left = N - block_key < block_keys ? N - block_key : block_keys;

  // There.
  T S[kKeys][Shape::kColumns];  // [key][column]
  load_state(job.initial, span.initial, whole.initial, S);
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    Pack<T>* to = checkpoint(chunk);
#pragma unroll
    for (int a = 0; a < kKeys; a++)
#pragma unroll
      for (int p = 0; p < kColumnPacks; p++) {
        Pack<T> pack;
#pragma unroll
        for (int c = 0; c < kPack; c++) pack.x[c] = S[a][p * kPack + c];
        to[(a * kColumnPacks + p) * 32] = pack;
      }
    if (chunk + 1 == chunks) break;
    const int64_t begin = chunk * C;
    fetch_rows<T, kKeyPacks>(there.k, job.k, span, h, begin, C, block_key, keys_left, whole.k);
    fetch_rows<T, kKeyPacks>(there.w, job.w, span, h, begin, C, block_key, keys_left, whole.w);
    fetch_rows<T, Shape::kRowPacks>(there.v, job.v, span, h, begin, C, 0, N, whole.v);
    copy_async_end();
    copy_async_wait<0>();
    unpack_rows<T, kKeyPacks>(there.k, job.k, C, C, keys_left, as_it_is);
    unpack_rows<T, kKeyPacks>(there.w, job.w, C, C, keys_left,
                              [](T w) { return decay_of_rate(decay_rate(w)); });
    unpack_rows<T, Shape::kRowPacks>(there.v, job.v, C, C, N, as_it_is);
    __syncthreads();
    for (int t = 0; t < C; t++) {
      const Pack<T> k = there.k[t][thread_key / kPack], d = there.w[t][thread_key / kPack];
#pragma unroll
      for (int p = 0; p < kColumnPacks; p++) {
        const Pack<T> v = there.v[t][p * Shape::kColumnLanes + column_lane];
#pragma unroll
        for (int a = 0; a < kKeys; a++)
#pragma unroll
          for (int c = 0; c < kPack; c++) {
            T& s = S[a][p * kPack + c];
            s = d.x[a] * s + k.x[a] * v.x[c];
          }
      }
    }
    __syncthreads();
  }

  // Back.
  T G[kKeys][Shape::kColumns];
  load_state(job.grad_final, m, whole.grad_final, G);
  const T u = lane_owns ? load_element<T>(job.u.row(h), job.u.dtype, block_key + lane_key) : T(0);
  T grad_u_sum = 0;
  for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
    const int64_t begin = chunk * C;
    const int tokens = span.length - begin < C ? int(span.length - begin) : C;
    fetch_rows<T, kKeyPacks>(back.r, job.r, span, h, begin, tokens, block_key, keys_left, whole.r);
    fetch_rows<T, kKeyPacks>(back.k, job.k, span, h, begin, tokens, block_key, keys_left, whole.k);
    fetch_rows<T, kKeyPacks>(back.w, job.w, span, h, begin, tokens, block_key, keys_left, whole.w);
    fetch_rows<T, Shape::kRowPacks>(back.v, job.v, span, h, begin, tokens, 0, N, whole.v);
    fetch_rows<T, Shape::kRowPacks>(back.grad_y, job.grad_y, span, h, begin, tokens, 0, N,
                                    whole.grad_y);
    copy_async_end();
    {
      const Pack<T>* from = checkpoint(chunk);
#pragma unroll
      for (int a = 0; a < kKeys; a++)
#pragma unroll
        for (int p = 0; p < kColumnPacks; p++) {
          const Pack<T> pack = from[(a * kColumnPacks + p) * 32];
#pragma unroll
          for (int c = 0; c < kPack; c++) S[a][p * kPack + c] = pack.x[c];
        }
    }
    copy_async_wait<0>();
    unpack_rows<T, kKeyPacks>(back.r, job.r, tokens, C, keys_left, as_it_is);
    unpack_rows<T, kKeyPacks>(back.k, job.k, tokens, C, keys_left, as_it_is);
    unpack_rows<T, kKeyPacks>(back.w, job.w, tokens, C, keys_left,
                              [](T w) { return decay_rate(w); });
    unpack_rows<T, Shape::kRowPacks>(back.v, job.v, tokens, C, N, as_it_is);
    unpack_rows<T, Shape::kRowPacks>(back.grad_y, job.grad_y, tokens, C, N, as_it_is);
    __syncthreads();

    // Every key by itself: F r and B k.
    if (lane < Shape::kWarpKeys) {
      T d[C], product = 1;
#pragma unroll
      for (int t = 0; t < C; t++) {
        d[t] = decay_of_rate(element(back.w[t], lane_key));
        element(back.fr[t], lane_key) = product * element(back.r[t], lane_key);
        product *= d[t];
      }
      back.all[lane_key] = product;
      product = 1;
#pragma unroll
      for (int t = C - 1; t >= 0; t--) {
        element(back.bk[t], lane_key) = product * element(back.k[t], lane_key);
        product *= d[t];
      }
    }
    // M, two tokens by two tokens.
    for (int at = threadIdx.x; at < C / 2 * (C / 2); at += blockDim.x) {
      const int t = at / (C / 2) * 2, s = at % (C / 2) * 2;
      if (s > t) continue;
      T sum[2][2] = {};
      for (int p = 0; p < Shape::kRowPacks; p++) {
        const Pack<T> y0 = back.grad_y[t][p], y1 = back.grad_y[t + 1][p];
        const Pack<T> v0 = back.v[s][p], v1 = back.v[s + 1][p];
#pragma unroll
        for (int e = 0; e < kPack; e++) {
          sum[0][0] += y0.x[e] * v0.x[e];
          sum[0][1] += y0.x[e] * v1.x[e];
          sum[1][0] += y1.x[e] * v0.x[e];
          sum[1][1] += y1.x[e] * v1.x[e];
        }
      }
      back.M[t][s] = sum[0][0];
      back.M[t][s + 1] = sum[0][1];
      back.M[t + 1][s] = sum[1][0];
      back.M[t + 1][s + 1] = sum[1][1];
    }
    __syncthreads();

    // G v_t and G^T (B_t k_t).
    for (int t0 = 0; t0 < C; t0 += Shape::kGroup) {
      const int buffer = t0 / Shape::kGroup % 2;
#pragma unroll
      for (int g = 0; g < Shape::kGroup; g++) {
        const int t = t0 + g;
        const Pack<T> bk = back.bk[t][thread_key / kPack];
        T gv[kKeys] = {}, gk[Shape::kColumns];
#pragma unroll
        for (int p = 0; p < kColumnPacks; p++) {
          const Pack<T> v = back.v[t][p * Shape::kColumnLanes + column_lane];
#pragma unroll
          for (int c = 0; c < kPack; c++) {
            T sum = 0;
#pragma unroll
            for (int a = 0; a < kKeys; a++) {
              gv[a] += G[a][p * kPack + c] * v.x[c];
              sum += G[a][p * kPack + c] * bk.x[a];
            }
            gk[p * kPack + c] = sum;
          }
        }
        const int a = sum_lanes<kKeys, 1, Shape::kColumnLanes / 2>(gv, lane);
        constexpr int kAcross = Shape::kColumnLanes;  // that hold the sums of kKeys
        constexpr int kHeldKeys = kKeys / kAcross > 1 ? kKeys / kAcross : 1;
        __syncwarp();  // everybody has read B k
        if (column_lane % (kAcross / kKeys > 1 ? kAcross / kKeys : 1) == 0)
#pragma unroll
          for (int e = 0; e < kHeldKeys; e++) element(back.bk[t], thread_key + a + e) = gv[e];
        const int first = sum_lanes<Shape::kColumns, Shape::kColumnLanes, 16>(gk, lane);
        constexpr int kHeld = Shape::kColumns / Shape::kKeyLanes;
#pragma unroll
        for (int e = 0; e < kHeld; e++)
          element(back.partial[buffer][warp][g],
                  int(column((first + e) / kPack)) + (first + e) % kPack) = gk[e];
      }
      __syncthreads();
      for (int at = threadIdx.x; at < Shape::kGroup * Shape::kRowPacks; at += blockDim.x) {
        const int g = at / Shape::kRowPacks, p = at % Shape::kRowPacks;
        Pack<T> sum = back.partial[buffer][0][g][p];
        for (int other = 1; other < warps; other++) {
          const Pack<T> pack = back.partial[buffer][other][g][p];
#pragma unroll
          for (int c = 0; c < kPack; c++) sum.x[c] += pack.x[c];
        }
        back.v[t0 + g][p] = sum;
      }
    }

    // sum_j S G, S dy_t, and G before the chunk.
    {
      T meeting[kKeys];
#pragma unroll
      for (int a = 0; a < kKeys; a++) {
        const T all = back.all[thread_key + a];
        meeting[a] = 0;
#pragma unroll
        for (int c = 0; c < Shape::kColumns; c++) {
          meeting[a] += S[a][c] * G[a][c];
          G[a][c] *= all;
        }
      }
      const int a = sum_lanes<kKeys, 1, Shape::kColumnLanes / 2>(meeting, lane);
      constexpr int kAcross = Shape::kColumnLanes;
      constexpr int kHeldKeys = kKeys / kAcross > 1 ? kKeys / kAcross : 1;
      if (column_lane % (kAcross / kKeys > 1 ? kAcross / kKeys : 1) == 0)
#pragma unroll
        for (int e = 0; e < kHeldKeys; e++) back.meeting[thread_key + a + e] = meeting[e];
      for (int t = 0; t < C; t++) {
        const Pack<T> fr = back.fr[t][thread_key / kPack];
        T sy[kKeys] = {};
#pragma unroll
        for (int p = 0; p < kColumnPacks; p++) {
          const Pack<T> y = back.grad_y[t][p * Shape::kColumnLanes + column_lane];
#pragma unroll
          for (int a = 0; a < kKeys; a++)
#pragma unroll
            for (int c = 0; c < kPack; c++) {
              sy[a] += S[a][p * kPack + c] * y.x[c];
              G[a][p * kPack + c] += fr.x[a] * y.x[c];
            }
        }
        const int a = sum_lanes<kKeys, 1, Shape::kColumnLanes / 2>(sy, lane);
        __syncwarp();  // everybody has read F r
        if (column_lane % (kAcross / kKeys > 1 ? kAcross / kKeys : 1) == 0)
#pragma unroll
          for (int e = 0; e < kHeldKeys; e++) element(back.fr[t], thread_key + a + e) = sy[e];
      }
    }
    __syncwarp();

    // The pairs of a chunk, every key by itself. D[s] is D(s, t); passed is the sum over the
    // sources that have been met so far, S and then tokens, of what of them arrives at t.
    {
      const bool active = lane < Shape::kWarpKeys;
      T k[C], D[C], grad_k[C], q[C];
      T F = 1;
#pragma unroll
      for (int t = 0; t < C; t++) {
        const T r = active ? element(back.r[t], lane_key) : T(0);
        const T d = active ? decay_of_rate(element(back.w[t], lane_key)) : T(1);
        k[t] = active ? element(back.k[t], lane_key) : T(0);
        T passed = active ? F * element(back.fr[t], lane_key) : T(0);
        T weight[C];
#pragma unroll
        for (int s = 0; s < t; s++) {
          const T m_d = D[s] * back.M[t][s];
          q[s] += r * passed;
          grad_k[s] += r * m_d;
          passed += k[s] * m_d;
          weight[s] = r * (k[s] * D[s]);
          D[s] *= d;
        }
        const T m_tt = back.M[t][t], u_k = u * k[t];
        D[t] = 1;
        q[t] = 0;
        grad_k[t] = u * r * m_tt;
        grad_u_sum += r * m_tt * k[t];
        weight[t] = r * u_k;
        if (active) element(back.r[t], lane_key) = passed + m_tt * u_k;
        F *= d;
#pragma unroll
        for (int s = t + 1; s < C; s++) weight[s] = 0;
        const int s = sum_lanes<C, 1, 16>(weight, lane);
        if (lane % (32 / C) == 0) back.A_parts[warp][t][s] = weight[0];
      }
      T passed = active ? F * back.meeting[lane_key] : T(0);
#pragma unroll
      for (int s = 0; s < C; s++) {
        q[s] += passed;
        const T arriving = active ? D[s] * element(back.bk[s], lane_key) : T(0);
        grad_k[s] += arriving;
        passed += k[s] * arriving;
        if (!active) continue;
        element(back.k[s], lane_key) = grad_k[s];
        element(back.w[s], lane_key) *= -q[s];
      }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < C * C; at += blockDim.x) {
      T sum = 0;
      for (int other = 0; other < warps; other++) sum += back.A_parts[other][at / C][at % C];
      back.A[at / C][at % C] = sum;
    }
    store_rows<T, kKeyPacks>(back.r, job.grad_r, span, h, begin, tokens, block_key, keys_left,
                             whole.grad_r);
    store_rows<T, kKeyPacks>(back.k, job.grad_k, span, h, begin, tokens, block_key, keys_left,
                             whole.grad_k);
    store_rows<T, kKeyPacks>(back.w, job.grad_w, span, h, begin, tokens, block_key, keys_left,
                             whole.grad_w);
    __syncthreads();
    for (int at = threadIdx.x; at < tokens * Shape::kRowPacks; at += blockDim.x) {
      const int s = at / Shape::kRowPacks, p = at % Shape::kRowPacks;
      Pack<T> sum = back.v[s][p];
      for (int t = s; t < tokens; t++) {
        const Pack<T> y = back.grad_y[t][p];
#pragma unroll
        for (int c = 0; c < kPack; c++) sum.x[c] += back.A[t][s] * y.x[c];
      }
      const int64_t j = p * kPack;
      store_pack(grad_v.row(span.b, span.begin + begin + s, h) + j * size_of(grad_v.dtype),
                 grad_v.dtype, sum, N - j, whole.grad_v);
    }
    __syncthreads();
  }

  if (lane_owns) grad_u[block_key + lane_key] = grad_u_sum;
  if (!grad_initial) return;
#pragma unroll
  for (int a = 0; a < kKeys; a++)
#pragma unroll
    for (int p = 0; p < kColumnPacks; p++) {
      const int64_t i = block_key + thread_key + a;
      Pack<T> pack;
#pragma unroll
      for (int c = 0; c < kPack; c++) pack.x[c] = G[a][p * kPack + c];
      if (i < N)
        store_pack(
            reinterpret_cast<char*>(grad_initial + i * job.grad_initial.stride_row + column(p)),
            job.grad_initial.dtype, pack, N - column(p), whole.grad_initial);
    }
}

// grad_v from the shares of a head's blocks. parts: [count, B, T, H, N]
template <class T>
__global__ void sum_parts_kernel(const T* parts, int64_t count, int64_t tokens,
                                 int64_t batch_tokens, int64_t H, int64_t N, Tokens out) {
  const int64_t size = tokens * H * N;
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= size) return;
  T sum = 0;
  for (int64_t p = 0; p < count; p++) sum += parts[p * size + at];
  const int64_t token = at / (H * N);
  store_element(out.row(token / batch_tokens, token % batch_tokens, at / N % H), out.dtype, at % N,
                sum);
}

template <class T, int P>
void launch_backward(const Launch& launch, const BackwardJob& job) {
  typedef Shape<T, P> Shape;
  const Sequences& sequences = job.sequences;
  const bool packed = sequences.cu_seqlens.data;
  const int64_t heads = sequences.count * job.H;
  const int64_t head_warps = (job.N + Shape::kWarpKeys - 1) / Shape::kWarpKeys;
  int64_t warps = head_warps < Shape::kMaxWarps ? head_warps : Shape::kMaxWarps;
  while (warps > 1 && heads * ((head_warps + warps - 1) / warps) < launch.multiprocessors)
    warps = (warps + 1) / 2;
  const int64_t parts = (head_warps + warps - 1) / warps;

  Workspace workspace = {};
  workspace.tokens = packed ? sequences.tokens : sequences.count * sequences.tokens;
  // Sequence m of cu_seqlens begins at chunk begin / kChunk + m.
  workspace.chunks = packed ? sequences.tokens / Shape::kChunk + sequences.count
                            : (sequences.tokens + Shape::kChunk - 1) / Shape::kChunk;
  const int64_t chunks = packed ? workspace.chunks : workspace.chunks * sequences.count;
  workspace.states = launch.workspace<Pack<T>>(job.H * chunks * parts * warps * Shape::kStatePacks);
  T* grad_u = launch.workspace<T>(heads * job.N);
  T* grad_v = parts > 1 ? launch.workspace<T>(parts * workspace.tokens * job.H * job.N) : nullptr;
  workspace.grad_u = grad_u;
  workspace.grad_v = grad_v;

  const Whole whole = {rows_whole<T>(job.grad_y),
                       rows_whole<T>(job.r),
                       rows_whole<T>(job.k),
                       rows_whole<T>(job.v),
                       rows_whole<T>(job.w),
                       rows_whole<T>(job.initial),
                       rows_whole<T>(job.grad_final),
                       rows_whole<T>(job.grad_r),
                       rows_whole<T>(job.grad_k),
                       parts > 1 ? job.N % Pack<T>::kSize == 0 : rows_whole<T>(job.grad_v),
                       rows_whole<T>(job.grad_w),
                       rows_whole<T>(job.grad_initial)};
  const int bytes = int(sizeof(Backward<T, P>));
  cudaFuncSetAttribute(backward_recurrent_kernel<T, P>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       bytes);
  backward_recurrent_kernel<T, P>
      <<<unsigned(heads * parts), unsigned(warps * 32), bytes, launch.stream>>>(job, parts, whole,
                                                                                workspace);
  check_launched("backward_recurrent");
  const int64_t size = workspace.tokens * job.H * job.N;
  if (parts > 1 && size > 0) {
    constexpr int kThreads = 256;
    sum_parts_kernel<<<unsigned((size + kThreads - 1) / kThreads), kThreads, 0, launch.stream>>>(
        grad_v, parts, workspace.tokens, sequences.tokens, job.H, job.N, job.grad_v);
    check_launched("sum_parts");
  }
  sum_heads(launch, grad_u, sequences.count, job.H, job.N, job.grad_u);
}

template <class T>
void backward(const Launch& launch, const BackwardJob& job) {
  if (job.N <= 32) return launch_backward<T, 32>(launch, job);
  if (job.N <= 64) return launch_backward<T, 64>(launch, job);
  if (job.N <= 128) return launch_backward<T, 128>(launch, job);
  launch_backward<T, 256>(launch, job);
}

}  // namespace

void backward_recurrent(const Launch& launch, const BackwardJob& job) {
  if (job.sequences.count * job.H == 0) {
    if (job.r.dtype == DType::f64)
      sum_heads<double>(launch, nullptr, 0, job.H, job.N, job.grad_u);
    else
      sum_heads<float>(launch, nullptr, 0, job.H, job.N, job.grad_u);
  } else if (job.r.dtype == DType::f64) {
    backward<double>(launch, job);
  } else {
    backward<float>(launch, job);
  }
}

}  // namespace rwkv6::cuda
