// WKV6 forward as the recurrence itself, with the state in registers: every dtype and head size,
// and the kernel of decoding.
//
//   y_t[j]  = sum_i r_t[i] S[i][j] + (sum_i r_t[i] u[i] k_t[i]) v_t[j]
//   S[i][j] = d_t[i] S[i][j] + k_t[i] v_t[j]
//
// Value columns are independent. A warp owns some of them with all their keys: a thread has a pack
// of columns and every kKeyLanes-th pack of keys, and the key lanes of a column add up y with a few
// shuffles. The warps of a block share the tokens, which come through shared memory a tile at a
// time, one tile ahead and unpacked by the thread that fetched them: one barrier a tile. Head sizes
// are padded by zeros: to 32, 64, 128 or 256, f64 to 64 or 256. Sequences that are too few to fill
// the GPU are cut into segments (segments.h).
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
  static constexpr int kKeyLanes = P <= 64 ? 4 : P / 16;
  static constexpr int kColumnLanes = 32 / kKeyLanes;
  static constexpr int kKeyPacks = P / kPack / kKeyLanes;            // of a thread
  static constexpr int kWarpColumns = kColumnLanes * kPack;          // of a warp
  static constexpr int kRowPacks = P / kPack;                        // of a token
  static constexpr int kRowLanes = kRowPacks < 32 ? kRowPacks : 32;  // that share a token's row
  static constexpr int kTile = 4096 / (P * sizeof(T)) < 8 ? 4096 / (P * sizeof(T)) : 8;  // tokens
  static constexpr int kMaxWarps = P / kWarpColumns < 4 ? P / kWarpColumns : 4;  // of a block
  // Of a multiprocessor: registers for 12 warps, or 16 of the smallest.
  static constexpr int kWarps = P == 32 ? 16 : 12;
};

// The rows of a tile: as fetched, then unpacked in place.
template <class T, int P>
struct Tile {
  static constexpr int kTokens = Shape<T, P>::kTile;
  Pack<T> r[kTokens][P / Pack<T>::kSize];
  Pack<T> k[kTokens][P / Pack<T>::kSize];
  Pack<T> w[kTokens][P / Pack<T>::kSize];  // then the change by the decay
  Pack<T> v[kTokens][P / Pack<T>::kSize];
  T bonus[kTokens];  // sum_i r u k
};

// Which packs of N elements can be read and written at once.
struct VectorAccess {
  bool r, k, v, w, initial, starts, final;  // final: checkpoints as well
};

template <class T, int P>
__global__ void __launch_bounds__(Shape<T, P>::kMaxWarps * 32,
                                  Shape<T, P>::kWarps / Shape<T, P>::kMaxWarps)
    forward_recurrent_kernel(ForwardJob job, Segments segments,
                             States starts,  // by_place, or absent
                             int64_t parts, VectorAccess vector) {
  typedef Shape<T, P> Shape;
  constexpr int kPack = Shape::kPack;
  constexpr int kTile = Shape::kTile;
  __shared__ Tile<T, P> tiles[2];

  __shared__ Place at;
  const int64_t part = blockIdx.x % parts;
  if (threadIdx.x == 0) at = Place(job.sequences, segments, job.H, blockIdx.x / parts);
  __syncthreads();
  if (at.is_left_over()) return;
  const Span& span = at.span;
  const int64_t h = at.h, begin = span.begin + at.first, length = at.last - at.first;
  const int N = int(job.N);
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = (int(part) * warps + warp) * Shape::kWarpColumns;  // column of the warp
  const bool has_final = at.is_end() && span.final >= 0;

  if (!span.valid || span.padding) {
    const T fill = span.padding ? T(0) : T(NAN);
    const int j = first + lane;
    if (lane >= Shape::kWarpColumns || j >= N) return;
    for (int64_t t = 0; t < length; t++)
      store_element(job.y.row(span.b, begin + t, h), job.y.dtype, j, fill);
    T* final = reinterpret_cast<T*>(job.final.matrix(span.final, h));
    for (int64_t i = 0; has_final && i < N; i++) final[i * job.final.stride_row + j] = fill;
    return;
  }

  // A thread's share of the rows of a tile: tokens row_token + n * row_tokens, packs row_pack + n *
  // kRowLanes.
  constexpr int kWarpTokens = 32 / Shape::kRowLanes;
  const int row_tokens = warps * kWarpTokens;
  const int row_token = warp * kWarpTokens + lane / Shape::kRowLanes;
  const int row_pack = lane % Shape::kRowLanes;
  const auto fetch = [&](int64_t tile) {
    Tile<T, P>& to = tiles[tile % 2];
    for (int t = row_token; t < kTile && tile * kTile + t < length; t += row_tokens) {
      const int64_t token = begin + tile * kTile + t;
      const char* r = job.r.row(span.b, token, h);
      const char* k = job.k.row(span.b, token, h);
      const char* w = job.w.row(span.b, token, h);
      const char* v = job.v.row(span.b, token, h);
#pragma unroll
      for (int p = row_pack; p < Shape::kRowPacks; p += Shape::kRowLanes) {
        const int i = p * kPack, count = N - i;
        fetch_pack(&to.r[t][p], r + i * size_of(job.r.dtype), job.r.dtype, count, vector.r);
        fetch_pack(&to.k[t][p], k + i * size_of(job.k.dtype), job.k.dtype, count, vector.k);
        fetch_pack(&to.w[t][p], w + i * size_of(job.w.dtype), job.w.dtype, count, vector.w);
        fetch_pack(&to.v[t][p], v + i * size_of(job.v.dtype), job.v.dtype, count, vector.v);
      }
    }
    cp_async_commit();
  };
  fetch(0);

  const int key_lane = lane / Shape::kColumnLanes, column_lane = lane % Shape::kColumnLanes;
  const int column = first + column_lane * kPack;
  T state[Shape::kKeyPacks][kPack][kPack];  // [pack of keys][key][column]
  {
    const bool started = starts.data && at.cut;
    const States from = started ? starts : job.initial;
    const int64_t from_row = started ? at.index : span.initial;
    const bool all = started ? vector.starts : vector.initial;
    const char* initial = from.data && from_row >= 0
                              ? from.matrix(from_row, h) + column * size_of(from.dtype)
                              : nullptr;
#pragma unroll
    for (int p = 0; p < Shape::kKeyPacks; p++)
#pragma unroll
      for (int e = 0; e < kPack; e++) {
        const int64_t i = (p * Shape::kKeyLanes + key_lane) * kPack + e;
        const bool there = initial && i < N;
        const Pack<T> row = there
                                ? load_pack<T>(initial + i * from.stride_row * size_of(from.dtype),
                                               from.dtype, N - column, all)
                                : zeros<T>();
#pragma unroll
        for (int c = 0; c < kPack; c++) state[p][e][c] = row.x[c];
      }
  }

  T u[Shape::kRowPacks / Shape::kRowLanes][kPack];
#pragma unroll
  for (int n = 0; n < Shape::kRowPacks / Shape::kRowLanes; n++)
#pragma unroll
    for (int e = 0; e < kPack; e++) {
      const int i = (row_pack + n * Shape::kRowLanes) * kPack + e;
      u[n][e] = job.u.data && i < N ? load_element<T>(job.u.row(h, span.b), job.u.dtype, i) : T(0);
    }

  const auto store_state = [&](const States& states, int64_t row) {
    char* matrix = states.matrix(row, h) + column * size_of(states.dtype);
#pragma unroll
    for (int p = 0; p < Shape::kKeyPacks; p++)
#pragma unroll
      for (int e = 0; e < kPack; e++) {
        const int64_t i = (p * Shape::kKeyLanes + key_lane) * kPack + e;
        Pack<T> values;
#pragma unroll
        for (int c = 0; c < kPack; c++) values.x[c] = state[p][e][c];
        if (i < N)
          store_pack(matrix + i * states.stride_row * size_of(states.dtype), states.dtype, values,
                     N - column, vector.final);
      }
  };

  char* y_row = job.y.row(span.b, begin, h);
  const int64_t tile_count = (length + kTile - 1) / kTile;
  for (int64_t tile = 0; tile < tile_count; tile++) {
    Tile<T, P>& rows = tiles[tile % 2];
    static_assert(kCheckpointTokens % kTile == 0);
    const int64_t token = at.first + tile * kTile, left = at.last - token;
    if (job.checkpoints.data && token && token % kCheckpointTokens == 0)
      store_state(job.checkpoints, job.sequences.checkpoint(span.b, span.begin, token));
    const int tokens = left < kTile ? int(left) : kTile;
    cp_async_wait<0>();
    for (int t0 = 0; t0 < tokens; t0 += row_tokens) {
      const int t = t0 + row_token;
      T bonus = 0;
      if (t < tokens) {
#pragma unroll
        for (int n = 0; n < Shape::kRowPacks / Shape::kRowLanes; n++) {
          const int p = row_pack + n * Shape::kRowLanes;
          const int count = N - p * kPack;
          const Pack<T> r = unpack(&rows.r[t][p], job.r.dtype, count);
          const Pack<T> k = unpack(&rows.k[t][p], job.k.dtype, count);
          const Pack<T> v = unpack(&rows.v[t][p], job.v.dtype, count);
          Pack<T> w = unpack(&rows.w[t][p], job.w.dtype, count);
#pragma unroll
          for (int e = 0; e < kPack; e++) {
            bonus += r.x[e] * u[n][e] * k.x[e];
            w.x[e] = change_of_rate(decay_rate(w.x[e]));
          }
          rows.r[t][p] = r;
          rows.k[t][p] = k;
          rows.v[t][p] = v;
          rows.w[t][p] = w;
        }
      }
      T sum[1] = {bonus};
      sum_lanes<1, 1, Shape::kRowLanes / 2>(sum, lane);
      if (t < tokens && row_pack == 0) rows.bonus[t] = sum[0];
    }
    __syncthreads();  // the tile is there, and nobody needs the one before
    if (tile + 1 < tile_count) fetch(tile + 1);

    // One token, or two at once: half as many sums are rounded to the state's size. With the decays
    // kept_q + m_q, as decay.cuh has them:
    //   y_0 = r_0 S, y_1 = r_1 d_0 S + (r_1 . k_0) v_0, S = d_0 d_1 S + d_1 k_0 v_0 + k_1 v_1
    //   d_0 d_1 = kept_0 kept_1 + (kept_0 m_1 + kept_1 m_0 + m_0 m_1)
    const auto walk = [&](int t, auto count) {
      constexpr int C = decltype(count)::value, kLast = C - 1;
      T y[C][kPack] = {};
      if (column < P) {
        Pack<T> v[C];
        T pair = 0;  // of this thread's keys
#pragma unroll
        for (int q = 0; q < C; q++) v[q] = rows.v[t + q][column / kPack];
#pragma unroll
        for (int p = 0; p < Shape::kKeyPacks; p++) {
          const int at = p * Shape::kKeyLanes + key_lane;
          Pack<T> r[C], k[C], m[C];
#pragma unroll
          for (int q = 0; q < C; q++)
            r[q] = rows.r[t + q][at], k[q] = rows.k[t + q][at], m[q] = rows.w[t + q][at];
#pragma unroll
          for (int e = 0; e < kPack; e++) {
            const T m_0 = m[0].x[e], m_1 = m[kLast].x[e];
            T kept = kept_of(m_0), change = m_0;
            if (C == 2) {
              const T kept_1 = kept_of(m_1);
              pair += r[kLast].x[e] * k[0].x[e];
              r[kLast].x[e] *= kept + m_0;
              k[0].x[e] *= kept_1 + m_1;
              change = m_0 * m_1 + (kept * m_1 + kept_1 * m_0);
              kept *= kept_1;
            }
#pragma unroll
            for (int c = 0; c < kPack; c++) {
              T& s = state[p][e][c];
              T added = k[kLast].x[e] * v[kLast].x[c];
              if (C == 2) added += k[0].x[e] * v[0].x[c];
#pragma unroll
              for (int q = 0; q < C; q++) y[q][c] += r[q].x[e] * s;
              s = kept * s + (change * s + added);
            }
          }
        }
        if (C == 2)
#pragma unroll
          for (int c = 0; c < kPack; c++) y[kLast][c] += pair * v[0].x[c];
      }
#pragma unroll
      for (int q = 0; q < C; q++, y_row += job.y.distance(1, 0)) {
        const int j = column + sum_lanes<kPack, Shape::kColumnLanes, 16>(y[q], lane);
        if (key_lane % (Shape::kKeyLanes / kPack) == 0 && j < N) {
          const T v = rows.v[t + q][j / kPack].x[j % kPack];
          store_element(y_row, job.y.dtype, j, y[q][0] + rows.bonus[t + q] * v);
        }
      }
    };
    int t = 0;
#pragma unroll 1
    for (; t + 1 < tokens; t += 2) walk(t, std::integral_constant<int, 2>());
    if (t < tokens) walk(t, std::integral_constant<int, 1>());
  }

  if (has_final) store_state(job.final, span.final);
}

// Predicted from counted instructions, as docs/cuda.md describes, and from what launches cost the
// chunked kernels: no times with segments were measured.
constexpr SegmentCosts kCosts = {
    .sharing = 0.2, .start = 6, .walk = 1.6, .scan = 60, .segment = 0.6, .multiple = 64};
// The same where only the final state is wanted: there is always a scan. A token takes half as long.
constexpr SegmentCosts kStateCosts = {
    .sharing = 0.4, .start = 10, .walk = 1, .scan = 0, .segment = 1.5, .multiple = 64};

template <class T, int P>
void launch_forward(const Launch& launch, const ForwardJob& job, const Walk& walk) {
  typedef Shape<T, P> Shape;
  const int64_t head_warps = (job.N + Shape::kWarpColumns - 1) / Shape::kWarpColumns;
  const Segments segments =
      segments_of(launch, job.sequences, job.H * head_warps, Shape::kWarps, kCosts);
  States starts;
  if (segments.cuts(job.sequences))
    starts = by_place(segment_starts<T>(launch, walk, segments), job.N);
  const int64_t heads = segments.count * job.H;
  int64_t warps = head_warps < Shape::kMaxWarps ? head_warps : Shape::kMaxWarps;
  while (warps > 1 && heads * ((head_warps + warps - 1) / warps) < launch.multiprocessors)
    warps = (warps + 1) / 2;
  const int64_t parts = (head_warps + warps - 1) / warps;
  const VectorAccess vector = {
      has_vector_rows<T>(job.r),
      has_vector_rows<T>(job.k),
      has_vector_rows<T>(job.v),
      has_vector_rows<T>(job.w),
      has_vector_rows<T>(job.initial),
      has_vector_rows<T>(starts),
      has_vector_rows<T>(job.final) && has_vector_rows<T>(job.checkpoints)};
  forward_recurrent_kernel<T, P>
      <<<blocks_for(heads * parts), unsigned(warps * 32), 0, launch.stream>>>(job, segments, starts,
                                                                              parts, vector);
  check_launched("forward_recurrent");
}

template <class T>
void forward(const Launch& launch, const ForwardJob& job) {
  const Walk walk = {Family::recurrent, job.sequences, job.H, job.N, job.k, job.v, job.w,
                     job.initial,       false};
  if (!job.y.data) {
    const int64_t squares = job.H * state_sum_squares<T>(job.N);
    segment_starts<T>(launch, walk,
                      segments_of(launch, job.sequences, squares, kStateSumBlocks, kStateCosts),
                      job.final);
    return;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (job.N <= 32) return launch_forward<T, 32>(launch, job, walk);
    if (64 < job.N && job.N <= 128) return launch_forward<T, 128>(launch, job, walk);
  }
  if (job.N <= 64) return launch_forward<T, 64>(launch, job, walk);
  launch_forward<T, 256>(launch, job, walk);
}

}  // namespace

void forward_recurrent(const Launch& launch, const ForwardJob& job) {
  if (job.sequences.count * job.H == 0) return;
  if (job.k.dtype == DType::f64)
    forward<double>(launch, job);
  else
    forward<float>(launch, job);
}

}  // namespace rwkv6::cuda
