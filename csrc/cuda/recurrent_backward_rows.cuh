// How the recurrent backward shares out a chunk: its shapes, a thread's place, and the rows and
// matrices that come in and go out. wkv_backward_recurrent.cu alone includes this.
#pragma once

#include <type_traits>

#include "cuda/decay.cuh"
#include "cuda/load.cuh"
#include "cuda/place.cuh"
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

// What a block shares in the first pass: keys and decays of its own, all values.
template <class T, int P>
struct Forward {
  typedef Shape<T, P> Shape;
  Pack<T> k[Shape::kChunk][Shape::kKeyPacks];
  Pack<T> w[Shape::kChunk][Shape::kKeyPacks];  // then the decay minus 1
  Pack<T> v[Shape::kChunk][Shape::kRowPacks];
};

// What a block shares in the second pass, in reverse.
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
  Pack<T> change[Shape::kKeyPacks];   // by the product of the chunk's decays
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
  bool grad_y, r, k, v, w, initial, starts, grad_final, ends;
  bool grad_r, grad_k, grad_v, grad_w, grad_initial;
};

struct Workspace {
  void* states;          // [H, chunks, parts, warps, kStatePacks] packs: S before every chunk
  void* grad_u;          // [segments, H, N]
  Tokens grad_v;         // of the first part
  int64_t grad_v_bytes;  // from one part's to the next one's
  int64_t chunks;        // of all segments, and one more for each
  int64_t parts;
};

struct Range {  // of the elements of a row
  int first, count;
};

// Where a block works: on some keys of a head, in a segment. Kept in shared memory: registers are for
// states.
struct Part : Place {
  Range keys, columns;
  int64_t states;        // packs before the block's first state
  int64_t chunk_states;  // packs from one chunk's to the next one's
  int64_t grad_v;        // bytes before the part's grad_v

  __device__ char* row(const Tokens& x, int64_t t) const {
    return x.row(span.b, span.begin + first + t, h);
  }
  __device__ int64_t length() const { return last - first; }
};

template <class T, int P>
__device__ Part part_of(const BackwardJob& job, const Segments& segments,
                        const Workspace& workspace) {
  typedef Shape<T, P> Shape;
  constexpr int C = Shape::kChunk;
  const int64_t part = blockIdx.x % workspace.parts;
  const int warps = blockDim.x / 32;
  Part place = {Place(job.sequences, segments, job.H, blockIdx.x / workspace.parts)};
  const int N = int(job.N), first = int(part) * warps * Shape::kWarpKeys;
  const int keys = N - first < warps * Shape::kWarpKeys ? N - first : warps * Shape::kWarpKeys;
  place.keys = {first, keys};
  place.columns = {0, N};
  place.grad_v = part * workspace.grad_v_bytes;
  const bool packed = job.sequences.cu_seqlens.data;
  // Segments of any lengths: begin / C + 2 segment leaves room for their chunks and one more.
  const int64_t segment = place.index / job.H;
  const int64_t chunk = packed ? (place.span.begin + place.first) / C + 2 * segment
                               : segment * (workspace.chunks / segments.count);
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
  __device__ Pack<T>* checkpoint(const Workspace& workspace, const Part& place,
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
__device__ void fetch_rows(Pack<T> (*rows)[pitch], const Tokens& x, const Part& place,
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
__device__ void store_rows(const Pack<T> (*rows)[pitch], const Tokens& x, const Part& place,
                           int64_t begin, int tokens, Range range, bool vector) {
#pragma unroll 1
  for (int at = threadIdx.x; at < tokens * packs; at += blockDim.x) {
    const int t = at / packs, i = at % packs * Pack<T>::kSize;
    store_pack(place.row(x, begin + t) + (range.first + i) * size_of(x.dtype), x.dtype,
               rows[t][at % packs], range.count - i, vector);
  }
}

template <class T, int P>
__device__ void load_checkpoint(const Workspace& workspace, const Part& place, int64_t chunk,
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
__device__ void store_checkpoint(const Workspace& workspace, const Part& place, int64_t chunk,
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
__device__ void load_matrix(const Workspace& workspace, const Part& place, int64_t chunk,
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
__device__ void store_matrix(const Workspace& workspace, const Part& place, int64_t chunk,
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

}  // namespace
}  // namespace rwkv6::cuda
