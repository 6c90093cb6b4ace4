// WKV6 backward on ordinary arithmetic units: every dtype and head size, f32 in f32.
//
// The formulas are at the head of cpu/wkv_backward.h. Let S be the state before a chunk of C tokens
// and G the gradient of the state after it. With
//
//   F_t     = the product of the decays of the chunk before token t
//   B_s     = the product of the decays of the chunk after token s
//   D(s, t) = d_{s+1} ... d_{t-1}
//   A[t][s] = sum_i r_t[i] D(s, t)[i] k_s[i]
//
// the gradients are, the terms of u apart,
//
//   dr_t = F_t (S dy_t)   + sum_{s < t}  D(s, t) k_s (v_s . dy_t)
//   dk_s = B_s (G v_s)    + sum_{t > s}  D(s, t) r_t (v_s . dy_t)
//   dv_s = G^T (B_s k_s)  + sum_{t >= s} A[t][s] dy_t
//
// and q_a is the sum over all pairs of a source (S or a token) before a and a target (a token or G)
// after a. Decays only enter as products of numbers in [0, 1], and no sum is a difference.
//
// A first pass stores the state before every chunk in the workspace; the second pass goes through
// the chunks in reverse. A warp owns some keys with all value columns. What is summed over columns
// (the gradients of r, k, w and u) therefore stays within the warp. What is summed over keys (A and
// dv) is added up through shared memory. The keys of a head that do not fit one block belong to
// other blocks, each with a dv of its own; sum_parts adds these up. Head sizes are padded with
// zeros: to 32, 64, 128 or 256, for f64 to 64 or 256.
#include <type_traits>

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
  static constexpr int kColumnLanes = P / kColumns;      // of a warp
  static constexpr int kKeyLanes = 32 / kColumnLanes;
  static constexpr int kWarpKeys = kKeyLanes * kKeys;
  static constexpr int kMaxWarps = P / kWarpKeys < 4 ? P / kWarpKeys : 4;  // of a block
  // Registers for 12 warps a multiprocessor, 8 of doubles.
  static constexpr int kBlocks = (sizeof(T) == 4 ? 12 : 8) / kMaxWarps;
  static constexpr int kKeyPacks = kMaxWarps * kWarpKeys / kPack;  // of a block
  static constexpr int kRowPacks = P / kPack;
  static constexpr int kGroup = P * sizeof(T) > 1024 ? 1 : 2;  // tokens whose dv is summed at once
  static constexpr int kStatePacks = kKeys * kColumnPacks * 32;  // of a warp
  static_assert(kColumnLanes >= kKeys && kColumns >= kKeyLanes);

  typedef T State[kKeys][kColumns];  // a thread's share of a state
};

// What a block shares on the walk there: keys and decays of its own, all values.
template <class T, int P>
struct Forward {
  typedef Shape<T, P> Shape;
  Pack<T> k[Shape::kChunk][Shape::kKeyPacks];
  Pack<T> w[Shape::kChunk][Shape::kKeyPacks];  // then the decay minus 1
  Pack<T> v[Shape::kChunk][Shape::kRowPacks];
};

// What a block shares on the walk back.
template <class T, int P>
struct Backward {
  typedef Shape<T, P> Shape;
  static constexpr int C = Shape::kChunk;
  // Of the keys of the block.
  Pack<T> r[C][Shape::kKeyPacks];     // then dr
  Pack<T> k[C][Shape::kKeyPacks];     // then dk
  Pack<T> w[C][Shape::kKeyPacks];     // then the decay's rate, then dw
  Pack<T> fr[C][Shape::kKeyPacks];    // F_t r_t, then S dy_t
  Pack<T> bk[C][Shape::kKeyPacks];    // B_t k_t, then G v_t
  Pack<T> change[Shape::kKeyPacks];   // product of the chunk's decays, minus 1
  Pack<T> meeting[Shape::kKeyPacks];  // sum_j S G
  Pack<T> u[Shape::kKeyPacks];
  Pack<T> grad_u[Shape::kKeyPacks];
  // Of all columns; a pack more than needed, so that the rows start at different banks.
  Pack<T> v[C][Shape::kRowPacks + 1];  // then G^T (B_t k_t)
  Pack<T> grad_y[C][Shape::kRowPacks + 1];
  Pack<T> partial[2][Shape::kMaxWarps][Shape::kGroup][Shape::kRowPacks];
  T M[C][C];  // [t][s]: dy_t . v_s
  T A[C][C];  // [t][s]
  T A_parts[Shape::kMaxWarps][C][C];
};

// Which packs of N elements can be read and written at once.
struct VectorAccess {
  bool grad_y, r, k, v, w, initial, grad_final;
  bool grad_r, grad_k, grad_v, grad_w, grad_initial;
};

struct Workspace {
  void* states;          // [H, chunks, parts, warps, kStatePacks] packs: S before every chunk
  void* grad_u;          // [count, H, N]
  Tokens grad_v;         // of the first part
  int64_t grad_v_bytes;  // from one part's to the next one's
  int64_t chunks;        // of all sequences, and one more for each
  int64_t parts;
};

struct Range {  // of the elements of a row
  int first, count;
};

// Where a block works. Kept in shared memory: registers are for states.
struct Place {
  Span span;
  int64_t m, h;
  Range keys, columns;
  int64_t states;        // packs before the block's first state
  int64_t chunk_states;  // packs from one chunk's to the next one's
  int64_t grad_v;        // bytes before the part's grad_v

  __device__ char* row(const Tokens& x, int64_t t) const {
    return x.row(span.b, span.begin + t, h);
  }
};

template <class T, int P>
__device__ Place place_of(const BackwardJob& job, const Workspace& workspace) {
  typedef Shape<T, P> Shape;
  constexpr int C = Shape::kChunk;
  Place place;
  const int64_t part = blockIdx.x % workspace.parts, head = blockIdx.x / workspace.parts;
  const int warps = blockDim.x / 32;
  place.h = head % job.H;
  place.m = head / job.H;
  place.span = span_of(job.sequences, place.m);
  const int N = int(job.N), first = int(part) * warps * Shape::kWarpKeys;
  const int keys = N - first < warps * Shape::kWarpKeys ? N - first : warps * Shape::kWarpKeys;
  place.keys = {first, keys};
  place.columns = {0, N};
  place.grad_v = part * workspace.grad_v_bytes;
  const bool packed = job.sequences.cu_seqlens.data;
  // Sequences of any lengths: begin / C + 2 m leaves room for their chunks and one more.
  const int64_t chunk = packed ? place.span.begin / C + 2 * place.m
                               : place.m * ((job.sequences.tokens + C - 1) / C + 1);
  place.chunk_states = workspace.parts * warps * Shape::kStatePacks;
  place.states =
      (place.h * workspace.chunks + chunk) * place.chunk_states + part * warps * Shape::kStatePacks;
  return place;
}

// A thread's place in its block: its share of the states is kKeys keys by kColumnPacks packs of
// columns; where keys are treated one by one, it has one of its own.
template <class T, int P>
struct Lane {
  typedef Shape<T, P> Shape;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int column_lane = lane % Shape::kColumnLanes;
  int key_pack = (warp * Shape::kWarpKeys) / Shape::kPack + lane / Shape::kColumnLanes;
  int own_key = warp * Shape::kWarpKeys + lane % Shape::kWarpKeys;
  bool owns = lane < Shape::kWarpKeys;

  __device__ int column_pack(int p) const { return p * Shape::kColumnLanes + column_lane; }

  // The thread's packs of the state before a chunk, which lie 32 packs apart.
  __device__ Pack<T>* checkpoint(const Workspace& workspace, const Place& place,
                                 int64_t chunk) const {
    return static_cast<Pack<T>*>(workspace.states) + place.states + chunk * place.chunk_states +
           warp * Shape::kStatePacks + lane;
  }

  // x[key], of this thread's columns, summed over all columns, to its place in a row of keys.
  __device__ void sum_columns(T (&x)[Shape::kKeys], Pack<T>* row) const {
    const int a = sum_lanes<Shape::kKeys, 1, Shape::kColumnLanes / 2>(x, lane);
    __syncwarp();  // everybody has read what was there
    if (column_lane % (Shape::kColumnLanes / Shape::kKeys) == 0) row[key_pack].x[a] = x[0];
  }
};

template <class T>
__device__ T* elements(Pack<T>* row) {
  return reinterpret_cast<T*>(row);
}

// Starts to copy the rows of `tokens` tokens from `begin` on.
template <class T, int packs, int pitch>
__device__ void fetch_rows(Pack<T> (*rows)[pitch], const Tokens& x, const Place& place,
                           int64_t begin, int tokens, Range range, bool vector) {
  if (!x.data) return;
#pragma unroll 1
  for (int at = threadIdx.x; at < tokens * packs; at += blockDim.x) {
    const int t = at / packs, i = at % packs * Pack<T>::kSize;
    fetch_pack(&rows[t][at % packs], place.row(x, begin + t) + (range.first + i) * size_of(x.dtype),
               x.dtype, range.count - i, vector);
  }
}

struct AsItIs {
  template <class T>
  __device__ T operator()(T x) const {
    return x;
  }
};
struct RateOf {
  template <class T>
  __device__ T operator()(T w) const {
    return decay_rate(w);
  }
};
struct ChangeOf {
  template <class T>
  __device__ T operator()(T w) const {
    return change_of_rate(decay_rate(w));
  }
};

// What this thread has fetched by fetch_rows, in its place; zeros where there is nothing.
template <class T, int packs, int chunk, int pitch, class Change>
__device__ void unpack_rows(Pack<T> (*rows)[pitch], const Tokens& x, int tokens, int count,
                            Change change) {
#pragma unroll 1
  for (int at = threadIdx.x; at < chunk * packs; at += blockDim.x) {
    const int t = at / packs, left = count - at % packs * Pack<T>::kSize;
    Pack<T>& pack = rows[t][at % packs];
    if (!x.data || t >= tokens || left <= 0) {
      pack = zeros<T>();
      continue;
    }
    Pack<T> changed = unpack(&pack, x.dtype, left);
#pragma unroll
    for (int e = 0; e < Pack<T>::kSize; e++) changed.x[e] = change(changed.x[e]);
    pack = changed;
  }
}

template <class T, int packs, int pitch>
__device__ void store_rows(const Pack<T> (*rows)[pitch], const Tokens& x, const Place& place,
                           int64_t begin, int tokens, Range range, bool vector) {
#pragma unroll 1
  for (int at = threadIdx.x; at < tokens * packs; at += blockDim.x) {
    const int t = at / packs, i = at % packs * Pack<T>::kSize;
    store_pack(place.row(x, begin + t) + (range.first + i) * size_of(x.dtype), x.dtype,
               rows[t][at % packs], range.count - i, vector);
  }
}

template <class T, int P>
__device__ void load_checkpoint(const Workspace& workspace, const Place& place, int64_t chunk,
                                typename Shape<T, P>::State& to) {
  typedef Shape<T, P> Shape;
  const Pack<T>* from = Lane<T, P>().checkpoint(workspace, place, chunk);
#pragma unroll
  for (int a = 0; a < Shape::kKeys; a++)
#pragma unroll
    for (int p = 0; p < Shape::kColumnPacks; p++) {
      const Pack<T> pack = from[(a * Shape::kColumnPacks + p) * 32];
#pragma unroll
      for (int c = 0; c < Shape::kPack; c++) to[a][p * Shape::kPack + c] = pack.x[c];
    }
}

template <class T, int P>
__device__ void store_checkpoint(const Workspace& workspace, const Place& place, int64_t chunk,
                                 const typename Shape<T, P>::State& from) {
  typedef Shape<T, P> Shape;
  Pack<T>* to = Lane<T, P>().checkpoint(workspace, place, chunk);
#pragma unroll
  for (int a = 0; a < Shape::kKeys; a++)
#pragma unroll
    for (int p = 0; p < Shape::kColumnPacks; p++) {
      Pack<T> pack;
#pragma unroll
      for (int c = 0; c < Shape::kPack; c++) pack.x[c] = from[a][p * Shape::kPack + c];
      to[(a * Shape::kColumnPacks + p) * 32] = pack;
    }
}

// Matrices of any dtype and layout come and go through a checkpoint: what indexes memory can be a
// loop, what indexes registers could not.
template <class T, int P>
__device__ void load_matrix(const Workspace& workspace, const Place& place, int64_t chunk,
                            const States& from, int64_t row, bool vector) {
  typedef Shape<T, P> Shape;
  const Lane<T, P> lane;
  const char* matrix = from.data && row >= 0 ? from.matrix(row, place.h) : nullptr;
  Pack<T>* to = lane.checkpoint(workspace, place, chunk);
#pragma unroll 1
  for (int n = 0; n < Shape::kKeys * Shape::kColumnPacks; n++) {
    const int key = lane.key_pack * Shape::kPack + n / Shape::kColumnPacks;
    const int64_t i = place.keys.first + key;
    const int j = lane.column_pack(n % Shape::kColumnPacks) * Shape::kPack;
    const bool there = matrix && key < place.keys.count;
    to[n * 32] = there ? load_pack<T>(matrix + (i * from.stride_row + j) * size_of(from.dtype),
                                      from.dtype, place.columns.count - j, vector)
                       : zeros<T>();
  }
}

template <class T, int P>
__device__ void store_matrix(const Workspace& workspace, const Place& place, int64_t chunk,
                             const States& to, int64_t row, bool vector) {
  typedef Shape<T, P> Shape;
  const Lane<T, P> lane;
  const Pack<T>* from = lane.checkpoint(workspace, place, chunk);
#pragma unroll 1
  for (int n = 0; n < Shape::kKeys * Shape::kColumnPacks; n++) {
    const int key = lane.key_pack * Shape::kPack + n / Shape::kColumnPacks;
    const int64_t i = place.keys.first + key;
    const int j = lane.column_pack(n % Shape::kColumnPacks) * Shape::kPack;
    if (key < place.keys.count)
      store_pack(to.matrix(row, place.h) + (i * to.stride_row + j) * size_of(to.dtype), to.dtype,
                 from[n * 32], place.columns.count - j, vector);
  }
}

// The walk there: leaves the state before every chunk behind.
template <class T, int P>
__device__ void recompute_states(const BackwardJob& job, const VectorAccess& vector,
                                 const Workspace& workspace, const Place& place, int64_t chunks,
                                 Forward<T, P>& rows) {
  typedef Shape<T, P> Shape;
  constexpr int C = Shape::kChunk;
  const Lane<T, P> lane;
  load_matrix<T, P>(workspace, place, 0, job.initial, place.span.initial, vector.initial);
  typename Shape::State S;
  load_checkpoint<T, P>(workspace, place, 0, S);
#pragma unroll 1
  for (int64_t chunk = 0; chunk + 1 < chunks; chunk++) {
    const int64_t begin = chunk * C;
    fetch_rows<T, Shape::kKeyPacks>(rows.k, job.k, place, begin, C, place.keys, vector.k);
    fetch_rows<T, Shape::kKeyPacks>(rows.w, job.w, place, begin, C, place.keys, vector.w);
    fetch_rows<T, Shape::kRowPacks>(rows.v, job.v, place, begin, C, place.columns, vector.v);
    cp_async_commit();
    cp_async_wait<0>();
    unpack_rows<T, Shape::kKeyPacks, C>(rows.k, job.k, C, place.keys.count, AsItIs());
    unpack_rows<T, Shape::kKeyPacks, C>(rows.w, job.w, C, place.keys.count, ChangeOf());
    unpack_rows<T, Shape::kRowPacks, C>(rows.v, job.v, C, place.columns.count, AsItIs());
    __syncthreads();
#pragma unroll 1
    for (int t = 0; t < C; t++) {
      const Pack<T> k = rows.k[t][lane.key_pack], change = rows.w[t][lane.key_pack];
#pragma unroll
      for (int p = 0; p < Shape::kColumnPacks; p++) {
        const Pack<T> v = rows.v[t][lane.column_pack(p)];
#pragma unroll
        for (int a = 0; a < Shape::kKeys; a++)
#pragma unroll
          for (int c = 0; c < Shape::kPack; c++) {
            T& s = S[a][p * Shape::kPack + c];
            s += change.x[a] * s + k.x[a] * v.x[c];
          }
      }
    }
    store_checkpoint<T, P>(workspace, place, chunk + 1, S);
    __syncthreads();
  }
}

// F_t r_t, B_t k_t and the product of all decays, every key by itself.
template <class T, int P>
__device__ void apply_decays(Backward<T, P>& back) {
  constexpr int C = Shape<T, P>::kChunk;
  const Lane<T, P> lane;
  const int i = lane.own_key;
  if (!lane.owns) return;
  T d[C], product = 1, change = 0;  // of the product, from 1
#pragma unroll
  for (int t = 0; t < C; t++) {
    const T m = change_of_rate(elements(back.w[t])[i]);
    d[t] = decay_of_rate(elements(back.w[t])[i]);
    elements(back.fr[t])[i] = product * elements(back.r[t])[i];
    product *= d[t];
    change = m * change + (m + change);
  }
  elements(back.change)[i] = change;
  product = 1;
#pragma unroll
  for (int t = C - 1; t >= 0; t--) {
    elements(back.bk[t])[i] = product * elements(back.k[t])[i];
    product *= d[t];
  }
}

// M, two tokens by two tokens.
template <class T, int P>
__device__ void multiply_values(Backward<T, P>& back) {
  constexpr int C = Shape<T, P>::kChunk;
#pragma unroll 1
  for (int at = threadIdx.x; at < C / 2 * (C / 2); at += blockDim.x) {
    const int t = at / (C / 2) * 2, s = at % (C / 2) * 2;
    if (s > t) continue;
    T sum[2][2] = {};
#pragma unroll 2
    for (int p = 0; p < Shape<T, P>::kRowPacks; p++) {
      const Pack<T> y0 = back.grad_y[t][p], y1 = back.grad_y[t + 1][p];
      const Pack<T> v0 = back.v[s][p], v1 = back.v[s + 1][p];
#pragma unroll
      for (int e = 0; e < Pack<T>::kSize; e++) {
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
}

// G v_t and G^T (B_t k_t). The warps' shares of the latter are added up a group of tokens at a
// time.
template <class T, int P>
__device__ void apply_gradient(Backward<T, P>& back, const typename Shape<T, P>::State& G) {
  typedef Shape<T, P> Shape;
  const Lane<T, P> lane;
#pragma unroll 1
  for (int t0 = 0; t0 < Shape::kChunk; t0 += Shape::kGroup) {
    auto& partial = back.partial[t0 / Shape::kGroup % 2];
#pragma unroll 1
    for (int g = 0; g < Shape::kGroup; g++) {
      const int t = t0 + g;
      const Pack<T> bk = back.bk[t][lane.key_pack];
      T gv[Shape::kKeys] = {}, gk[Shape::kColumns];
#pragma unroll
      for (int p = 0; p < Shape::kColumnPacks; p++) {
        const Pack<T> v = back.v[t][lane.column_pack(p)];
#pragma unroll
        for (int c = 0; c < Shape::kPack; c++) {
          const int j = p * Shape::kPack + c;
          gk[j] = 0;
#pragma unroll
          for (int a = 0; a < Shape::kKeys; a++) {
            gv[a] += G[a][j] * v.x[c];
            gk[j] += G[a][j] * bk.x[a];
          }
        }
      }
      lane.sum_columns(gv, back.bk[t]);
      const int first = sum_lanes<Shape::kColumns, Shape::kColumnLanes, 16>(gk, lane.lane);
#pragma unroll
      for (int e = 0; e < Shape::kColumns / Shape::kKeyLanes; e++) {
        const int j = first + e;
        partial[lane.warp][g][lane.column_pack(j / Shape::kPack)].x[j % Shape::kPack] = gk[e];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x; at < Shape::kGroup * Shape::kRowPacks; at += blockDim.x) {
      const int g = at / Shape::kRowPacks, p = at % Shape::kRowPacks;
      Pack<T> sum = partial[0][g][p];
#pragma unroll 1
      for (int warp = 1; warp < blockDim.x / 32; warp++) {
        const Pack<T> share = partial[warp][g][p];
#pragma unroll
        for (int c = 0; c < Shape::kPack; c++) sum.x[c] += share.x[c];
      }
      back.v[t0 + g][p] = sum;
    }
  }
}

// sum_j S G and S dy_t; G becomes the gradient of the state before the chunk.
template <class T, int P>
__device__ void apply_state(Backward<T, P>& back, const typename Shape<T, P>::State& S,
                            typename Shape<T, P>::State& G) {
  typedef Shape<T, P> Shape;
  const Lane<T, P> lane;
  T sums[Shape::kKeys] = {};
  const Pack<T> change = back.change[lane.key_pack];
#pragma unroll
  for (int a = 0; a < Shape::kKeys; a++)
#pragma unroll
    for (int j = 0; j < Shape::kColumns; j++) {
      sums[a] += S[a][j] * G[a][j];
      G[a][j] += change.x[a] * G[a][j];
    }
  lane.sum_columns(sums, back.meeting);
#pragma unroll 1
  for (int t = 0; t < Shape::kChunk; t++) {
    const Pack<T> fr = back.fr[t][lane.key_pack];
    T sy[Shape::kKeys] = {};
#pragma unroll
    for (int p = 0; p < Shape::kColumnPacks; p++) {
      const Pack<T> y = back.grad_y[t][lane.column_pack(p)];
#pragma unroll
      for (int a = 0; a < Shape::kKeys; a++)
#pragma unroll
        for (int c = 0; c < Shape::kPack; c++) {
          sy[a] += S[a][p * Shape::kPack + c] * y.x[c];
          G[a][p * Shape::kPack + c] += fr.x[a] * y.x[c];
        }
    }
    lane.sum_columns(sy, back.fr[t]);
  }
  __syncwarp();
}

// The pairs of the chunk, every key by itself: dr, dk and dw in the place of r, k and the rates,
// the warp's share of A, and du so far.
//
// D[s] is D(s, t). `passed` is what arrives at t of the sources met so far, first S, then the
// tokens one by one: passing s on their way, they are q's at s.
template <class T, int P>
__device__ void intra_chunk_backward(Backward<T, P>& back) {
  constexpr int C = Shape<T, P>::kChunk;
  const Lane<T, P> lane;
  const int i = lane.own_key;
  T k[C], D[C], grad_k[C], q[C];
  const T u = elements(back.u)[i];
  T F = 1, grad_u = 0;
#pragma unroll
  for (int t = 0; t < C; t++) {
    const T r = lane.owns ? elements(back.r[t])[i] : T(0);
    k[t] = lane.owns ? elements(back.k[t])[i] : T(0);
    const T d = lane.owns ? decay_of_rate(elements(back.w[t])[i]) : T(0);
    const T m_tt = back.M[t][t], u_k = u * k[t];
    T passed = lane.owns ? F * elements(back.fr[t])[i] : T(0);
#pragma unroll
    for (int s0 = 0; s0 <= t; s0 += C / 2) {
      T weight[C / 2];  // half a row of A
#pragma unroll
      for (int s = s0; s < s0 + C / 2; s++) {
        weight[s - s0] = s < t ? r * (k[s] * D[s]) : s == t ? r * u_k : T(0);
        if (s >= t) continue;
        const T m_d = D[s] * back.M[t][s];
        q[s] += r * passed;
        grad_k[s] += r * m_d;
        passed += k[s] * m_d;
        D[s] *= d;
      }
      const int s = s0 + sum_lanes<C / 2, 1, 16>(weight, lane.lane);
      if (lane.lane % (64 / C) == 0) back.A_parts[lane.warp][t][s] = weight[0];
    }
    D[t] = 1;
    q[t] = 0;
    grad_k[t] = u * r * m_tt;
    grad_u += r * m_tt * k[t];
    if (lane.owns) elements(back.r[t])[i] = passed + m_tt * u_k;
    F *= d;
  }
  if (!lane.owns) return;
  elements(back.grad_u)[i] += grad_u;
  T passed = F * elements(back.meeting)[i];  // at G
#pragma unroll
  for (int s = 0; s < C; s++) {
    const T arriving = D[s] * elements(back.bk[s])[i];
    q[s] += passed;
    passed += k[s] * arriving;
    elements(back.k[s])[i] = grad_k[s] + arriving;
    T& rate = elements(back.w[s])[i];
    rate = rate == 0 ? T(0) : -rate * q[s];
  }
}

// dv, from what has been found with G and the rows of A.
template <class T, int P>
__device__ void store_grad_v(const Backward<T, P>& back, const Tokens& grad_v, const Place& place,
                             int64_t begin, int tokens, bool vector) {
  constexpr int kRowPacks = Shape<T, P>::kRowPacks;
#pragma unroll 1
  for (int at = threadIdx.x; at < tokens * kRowPacks; at += blockDim.x) {
    const int s = at / kRowPacks, p = at % kRowPacks, j = p * Pack<T>::kSize;
    Pack<T> sum = back.v[s][p];
#pragma unroll 2
    for (int t = s; t < tokens; t++) {
      const Pack<T> y = back.grad_y[t][p];
      const T a = back.A[t][s];
#pragma unroll
      for (int c = 0; c < Pack<T>::kSize; c++) sum.x[c] += a * y.x[c];
    }
    store_pack(place.row(grad_v, begin + s) + place.grad_v + j * size_of(grad_v.dtype),
               grad_v.dtype, sum, place.columns.count - j, vector);
  }
}

template <class T, int P>
__device__ void fill_with_nan(const BackwardJob& job, const Workspace& workspace,
                              const Place& place, T* grad_u) {
  for (int i = threadIdx.x; i < place.columns.count; i += blockDim.x) {
    const bool own = i >= place.keys.first && i < place.keys.first + place.keys.count;
#pragma unroll 1
    for (int64_t t = 0; t < place.span.length; t++) {
      store_element(place.row(workspace.grad_v, t) + place.grad_v, workspace.grad_v.dtype, i,
                    T(NAN));
      if (!own) continue;
      store_element(place.row(job.grad_r, t), job.grad_r.dtype, i, T(NAN));
      store_element(place.row(job.grad_k, t), job.grad_k.dtype, i, T(NAN));
      store_element(place.row(job.grad_w, t), job.grad_w.dtype, i, T(NAN));
    }
    if (own) grad_u[i] = T(NAN);
    if (!job.grad_initial.data) continue;
    T* matrix = reinterpret_cast<T*>(job.grad_initial.matrix(place.m, place.h));
#pragma unroll 1
    for (int key = 0; key < place.keys.count; key++)
      matrix[(place.keys.first + key) * job.grad_initial.stride_row + i] = T(NAN);
  }
}

template <class T, int P>
__global__ void __launch_bounds__(Shape<T, P>::kMaxWarps * 32, Shape<T, P>::kBlocks)
    backward_recurrent_kernel(BackwardJob job, VectorAccess vector, Workspace workspace) {
  typedef Shape<T, P> Shape;
  constexpr int C = Shape::kChunk;
  extern __shared__ __align__(16) char shared[];
  __shared__ Place place;
  if (threadIdx.x == 0) place = place_of<T, P>(job, workspace);
  __syncthreads();
  T* grad_u = static_cast<T*>(workspace.grad_u) + (place.m * job.H + place.h) * job.N;
  if (!place.span.valid) return fill_with_nan<T, P>(job, workspace, place, grad_u);

  const int64_t chunks = (place.span.length + C - 1) / C;
  recompute_states<T, P>(job, vector, workspace, place, chunks,
                         *reinterpret_cast<Forward<T, P>*>(shared));

  Backward<T, P>& back = *reinterpret_cast<Backward<T, P>*>(shared);
  const Lane<T, P> lane;
  const bool owns = lane.owns && lane.own_key < place.keys.count;
  if (lane.owns) {
    elements(back.u)[lane.own_key] =
        owns && job.u.data ? load_element<T>(job.u.row(place.h, place.span.b), job.u.dtype,
                                             place.keys.first + lane.own_key)
                           : T(0);
    elements(back.grad_u)[lane.own_key] = 0;
  }
  typename Shape::State S, G;
  load_matrix<T, P>(workspace, place, chunks, job.grad_final, place.m, vector.grad_final);
  load_checkpoint<T, P>(workspace, place, chunks, G);
#pragma unroll 1
  for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
    const int64_t begin = chunk * C, left = place.span.length - begin;
    const int tokens = left < C ? int(left) : C;
    const Range keys = place.keys, columns = place.columns;
    fetch_rows<T, Shape::kKeyPacks>(back.r, job.r, place, begin, tokens, keys, vector.r);
    fetch_rows<T, Shape::kKeyPacks>(back.k, job.k, place, begin, tokens, keys, vector.k);
    fetch_rows<T, Shape::kKeyPacks>(back.w, job.w, place, begin, tokens, keys, vector.w);
    fetch_rows<T, Shape::kRowPacks>(back.v, job.v, place, begin, tokens, columns, vector.v);
    fetch_rows<T, Shape::kRowPacks>(back.grad_y, job.grad_y, place, begin, tokens, columns,
                                    vector.grad_y);
    cp_async_commit();
    cp_async_wait<0>();
    unpack_rows<T, Shape::kKeyPacks, C>(back.r, job.r, tokens, keys.count, AsItIs());
    unpack_rows<T, Shape::kKeyPacks, C>(back.k, job.k, tokens, keys.count, AsItIs());
    // Without a gradient of the final state the last token's decay does not matter, be it NaN.
    const int decaying = left <= C && !job.grad_final.data ? tokens - 1 : tokens;
    unpack_rows<T, Shape::kKeyPacks, C>(back.w, job.w, decaying, keys.count, RateOf());
    unpack_rows<T, Shape::kRowPacks, C>(back.v, job.v, tokens, columns.count, AsItIs());
    unpack_rows<T, Shape::kRowPacks, C>(back.grad_y, job.grad_y, tokens, columns.count, AsItIs());
    __syncthreads();
    apply_decays(back);
    multiply_values(back);
    __syncthreads();
    apply_gradient(back, G);
    load_checkpoint<T, P>(workspace, place, chunk,
                          S);  // not before: with G it takes most registers
    apply_state(back, S, G);
    intra_chunk_backward(back);
    if (decaying < tokens && owns) {  // that token's gradient of w: 0, or NaN where w is
      const T w = load_element<T>(place.row(job.w, begin + decaying), job.w.dtype,
                                  place.keys.first + lane.own_key);
      elements(back.w[decaying])[lane.own_key] = w == w ? T(0) : w;
    }
    __syncthreads();
    if (!job.grad_y.data) {  // then r and u have no gradient, also where a state is NaN
#pragma unroll 1
      for (int at = threadIdx.x; at < C * Shape::kKeyPacks; at += blockDim.x)
        back.r[at / Shape::kKeyPacks][at % Shape::kKeyPacks] = zeros<T>();
      if (owns) elements(back.grad_u)[lane.own_key] = 0;
      __syncthreads();
    }
#pragma unroll 1
    for (int at = threadIdx.x; at < C * C; at += blockDim.x) {
      T sum = 0;
#pragma unroll 1
      for (int warp = 0; warp < blockDim.x / 32 && at % C <= at / C; warp++)
        sum += back.A_parts[warp][at / C][at % C];
      back.A[at / C][at % C] = sum;
    }
    store_rows<T, Shape::kKeyPacks>(back.r, job.grad_r, place, begin, tokens, keys, vector.grad_r);
    store_rows<T, Shape::kKeyPacks>(back.k, job.grad_k, place, begin, tokens, keys, vector.grad_k);
    store_rows<T, Shape::kKeyPacks>(back.w, job.grad_w, place, begin, tokens, keys, vector.grad_w);
    __syncthreads();
    store_grad_v(back, workspace.grad_v, place, begin, tokens, vector.grad_v);
    __syncthreads();
  }

  if (owns) grad_u[place.keys.first + lane.own_key] = elements(back.grad_u)[lane.own_key];
  if (!job.grad_initial.data) return;
  store_checkpoint<T, P>(workspace, place, chunks, G);
  store_matrix<T, P>(workspace, place, chunks, job.grad_initial, place.m, vector.grad_initial);
}

// grad_v from the shares of a head's blocks. parts: [count, B, T, H, N]
template <class T>
__global__ void sum_parts_kernel(const T* parts, int64_t count, int64_t tokens,
                                 int64_t batch_tokens, int64_t H, int64_t N, Tokens out) {
  const int64_t size = tokens * H * N;
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= size) return;
  T sum = 0;
#pragma unroll 1
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

  // Every sequence has room for one more state than it has chunks.
  const int64_t tokens = packed ? sequences.tokens : sequences.count * sequences.tokens;
  const int64_t chunks =
      packed ? sequences.tokens / Shape::kChunk + 2 * sequences.count
             : ((sequences.tokens + Shape::kChunk - 1) / Shape::kChunk + 1) * sequences.count;
  T* grad_u = launch.workspace<T>(heads * job.N);
  T* grad_v = parts > 1 ? launch.workspace<T>(parts * tokens * job.H * job.N) : nullptr;
  Tokens grad_v_parts = job.grad_v;
  if (parts > 1)
    grad_v_parts = {reinterpret_cast<char*>(grad_v), sizeof(T) == 8 ? DType::f64 : DType::f32,
                    sequences.tokens * job.H * job.N, job.H * job.N, job.N};
  const Workspace workspace = {
      launch.workspace<Pack<T>>(job.H * chunks * parts * warps * Shape::kStatePacks),
      grad_u,
      grad_v_parts,
      tokens * job.H * job.N * int64_t(sizeof(T)),
      chunks,
      parts};

  const VectorAccess vector = {
      has_vector_rows<T>(job.grad_y),     has_vector_rows<T>(job.r),
      has_vector_rows<T>(job.k),          has_vector_rows<T>(job.v),
      has_vector_rows<T>(job.w),          has_vector_rows<T>(job.initial),
      has_vector_rows<T>(job.grad_final), has_vector_rows<T>(job.grad_r),
      has_vector_rows<T>(job.grad_k),     has_vector_rows<T>(grad_v_parts),
      has_vector_rows<T>(job.grad_w),     has_vector_rows<T>(job.grad_initial)};
  const int bytes = int(sizeof(Backward<T, P>));
  static_assert(sizeof(Backward<T, P>) <= 99 * 1024);  // on every architecture from 8.0 on
  if (bytes > 48 * 1024)
    check(cudaFuncSetAttribute(backward_recurrent_kernel<T, P>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "backward_recurrent");
  backward_recurrent_kernel<T, P>
      <<<blocks_for(heads * parts), unsigned(warps * 32), bytes, launch.stream>>>(job, vector,
                                                                                  workspace);
  check_launched("backward_recurrent");
  const int64_t size = tokens * job.H * job.N;
  if (parts > 1 && size > 0) {
    constexpr int kThreads = 256;
    sum_parts_kernel<<<blocks_for(size, kThreads), kThreads, 0, launch.stream>>>(
        grad_v, parts, tokens, sequences.tokens, job.H, job.N, job.grad_v);
    check_launched("sum_parts");
  }
  sum_heads(launch, grad_u, sequences.count, 1, job.H, job.N, job.grad_u);
}

template <class T>
void backward(const Launch& launch, const BackwardJob& job) {
  if constexpr (std::is_same_v<T, float>) {
    if (job.N <= 32) return launch_backward<T, 32>(launch, job);
    if (64 < job.N && job.N <= 128) return launch_backward<T, 128>(launch, job);
  }
  if (job.N <= 64) return launch_backward<T, 64>(launch, job);
  launch_backward<T, 256>(launch, job);
}

}  // namespace

void backward_recurrent(const Launch& launch, const BackwardJob& job) {
  if (job.sequences.count * job.H == 0) {
    if (job.r.dtype == DType::f64)
      sum_heads<double>(launch, nullptr, 0, 0, job.H, job.N, job.grad_u);
    else
      sum_heads<float>(launch, nullptr, 0, 0, job.H, job.N, job.grad_u);
  } else if (job.r.dtype == DType::f64) {
    backward<double>(launch, job);
  } else {
    backward<float>(launch, job);
  }
}

}  // namespace rwkv6::cuda
