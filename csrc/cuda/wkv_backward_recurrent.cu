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
// the chunks in reverse. Sequences that are too few to fill the GPU are cut into segments
// (segments.h), each with both passes. A warp owns some keys with all value columns. What is summed over columns
// (the gradients of r, k, w and u) therefore stays within the warp. What is summed over keys (A and
// dv) is added up through shared memory. The keys of a head that do not fit one block belong to
// other blocks, each with a dv of its own; sum_parts adds these up. Head sizes are padded with
// zeros: to 32, 64, 128 or 256, for f64 to 64 or 256.
#include "cuda/recurrent_backward_chunk.cuh"

namespace rwkv6::cuda {
namespace {

// Where segments start and end, by_place; absent where sequences have one. Segments start from
// checkpoints where these are given.
struct Borders {
  States starts, ends;
};

// The first pass: stores the state before every chunk.
template <class T, int P>
__device__ void recompute_states(const BackwardJob& job, const States& starts,
                                 const VectorAccess& vector, const Workspace& workspace,
                                 const Part& place, int64_t chunks, Forward<T, P>& rows) {
  typedef Shape<T, P> Shape;
  constexpr int C = Shape::kChunk;
  const Lane<T, P> lane;
  if (place.segment == 0)
    load_matrix<T, P>(workspace, place, 0, job.initial, place.span.initial, vector.initial);
  else if (starts.data)
    load_matrix<T, P>(workspace, place, 0, starts, place.index, vector.starts);
  else
    load_matrix<T, P>(workspace, place, 0, job.checkpoints,
                      job.sequences.checkpoint(place.span.b, place.span.begin, place.first),
                      vector.starts);
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
            s = kept_of(change.x[a]) * s + (change.x[a] * s + k.x[a] * v.x[c]);
          }
      }
    }
    store_checkpoint<T, P>(workspace, place, chunk + 1, S);
    __syncthreads();
  }
}

// dv, from what has been found with G and the rows of A.
template <class T, int P>
__device__ void store_grad_v(const Backward<T, P>& back, const Tokens& grad_v, const Part& place,
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
__device__ void fill_with_nan(const BackwardJob& job, const Workspace& workspace, const Part& place,
                              T* grad_u) {
  for (int i = threadIdx.x; i < place.columns.count; i += blockDim.x) {
    const bool own = i >= place.keys.first && i < place.keys.first + place.keys.count;
#pragma unroll 1
    for (int64_t t = 0; t < place.length(); t++) {
      store_element(place.row(workspace.grad_v, t) + place.grad_v, workspace.grad_v.dtype, i,
                    T(NAN));
      if (!own) continue;
      store_element(place.row(job.grad_r, t), job.grad_r.dtype, i, T(NAN));
      store_element(place.row(job.grad_k, t), job.grad_k.dtype, i, T(NAN));
      store_element(place.row(job.grad_w, t), job.grad_w.dtype, i, T(NAN));
    }
    if (own) grad_u[i] = T(NAN);
    if (!job.grad_initial.data || place.segment > 0) continue;
    T* matrix = reinterpret_cast<T*>(job.grad_initial.matrix(place.m, place.h));
#pragma unroll 1
    for (int key = 0; key < place.keys.count; key++)
      matrix[(place.keys.first + key) * job.grad_initial.stride_row + i] = T(NAN);
  }
}

template <class T, int P>
__global__ void __launch_bounds__(Shape<T, P>::kMaxWarps * 32, Shape<T, P>::kBlocks)
    backward_recurrent_kernel(BackwardJob job, Segments segments, Borders borders,
                              VectorAccess vector, Workspace workspace) {
  typedef Shape<T, P> Shape;
  constexpr int C = Shape::kChunk;
  extern __shared__ __align__(16) char shared[];
  __shared__ Part place;
  if (threadIdx.x == 0) place = part_of<T, P>(job, segments, workspace);
  __syncthreads();
  T* grad_u = static_cast<T*>(workspace.grad_u) + place.index * job.N;
  const Lane<T, P> lane;
  const bool owns = lane.owns && lane.own_key < place.keys.count;
  if (place.is_left_over()) {
    if (owns) grad_u[place.keys.first + lane.own_key] = 0;
    return;
  }
  if (!place.span.valid) return fill_with_nan<T, P>(job, workspace, place, grad_u);

  const int64_t chunks = (place.length() + C - 1) / C;
  recompute_states<T, P>(job, borders.starts, vector, workspace, place, chunks,
                         *reinterpret_cast<Forward<T, P>*>(shared));

  Backward<T, P>& back = *reinterpret_cast<Backward<T, P>*>(shared);
  if (lane.owns) {
    elements(back.u)[lane.own_key] =
        owns && job.u.data ? load_element<T>(job.u.row(place.h, place.span.b), job.u.dtype,
                                             place.keys.first + lane.own_key)
                           : T(0);
    elements(back.grad_u)[lane.own_key] = 0;
  }
  typename Shape::State S, G;
  if (place.is_end())
    load_matrix<T, P>(workspace, place, chunks, job.grad_final, place.m, vector.grad_final);
  else
    load_matrix<T, P>(workspace, place, chunks, borders.ends, place.index, vector.ends);
  // Without a gradient of the final state the last token's decay does not matter, be it NaN.
  const auto last_decays = [&] { return !place.is_end() || job.grad_final.data; };
  load_checkpoint<T, P>(workspace, place, chunks, G);
#pragma unroll 1
  for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
    const int64_t begin = chunk * C, left = place.length() - begin;
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
    const int decaying = left <= C && !last_decays() ? tokens - 1 : tokens;
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
  if (job.grad_initial.data && place.segment == 0) {
    store_checkpoint<T, P>(workspace, place, chunks, G);
    store_matrix<T, P>(workspace, place, chunks, job.grad_initial, place.m, vector.grad_initial);
  }
  if (last_decays() || place.length() == 0 || !owns) return;
  // The last token's gradient of w is 0 then, but NaN where w is.
  const int64_t last = place.length() - 1, key = place.keys.first + lane.own_key;
  const T w = load_element<T>(place.row(job.w, last), job.w.dtype, key);
  if (w != w) store_element(place.row(job.grad_w, last), job.grad_w.dtype, key, w);
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

// Predicted as those of the forward are, not measured.
constexpr SegmentCosts kCosts = {.sharing = 0.2,
                                 .start = 4,
                                 .walk = 1.5,
                                 .scan = 30,
                                 .segment = 0.4,
                                 .multiple = kCheckpointTokens};
// With checkpoints nothing walks forwards.
constexpr SegmentCosts kCostsFromKept = {.sharing = kCosts.sharing,
                                         .start = kCosts.start,
                                         .walk = 1.25,
                                         .scan = 15,
                                         .segment = 0.2,
                                         .multiple = kCheckpointTokens};

template <class T, int P>
void launch_backward(const Launch& launch, const BackwardJob& job) {
  typedef Shape<T, P> Shape;
  const Sequences& sequences = job.sequences;
  const bool packed = sequences.cu_seqlens.data;
  const int bytes = int(sizeof(Backward<T, P>));
  static_assert(sizeof(Backward<T, P>) <= 99 * 1024);  // on every architecture from 8.0 on
  const int64_t head_warps = (job.N + Shape::kWarpKeys - 1) / Shape::kWarpKeys;
  const auto kernel_of = [&](int64_t warps) {
    return Kernel{"backward_recurrent", backward_recurrent_kernel<T, P>, int(warps * 32), bytes};
  };
  const Segments segments =
      segments_of(launch, sequences, job.H * head_warps,
                  kernel_of(Shape::kMaxWarps).blocks_each(launch) * Shape::kMaxWarps,
                  job.checkpoints.data ? kCostsFromKept : kCosts);
  Borders borders;
  if (segments.cuts(sequences)) {
    const Walk forwards = {Family::recurrent, sequences, job.H, job.N, job.k, job.v, job.w,
                           job.initial,       false};
    const Walk backwards = {Family::recurrent, sequences, job.H,          job.N, job.r,
                            job.grad_y,        job.w,     job.grad_final, true};
    borders.ends = by_place(segment_starts<T>(launch, backwards, segments), job.N);
    if (!job.checkpoints.data)
      borders.starts = by_place(segment_starts<T>(launch, forwards, segments), job.N);
  }
  const int64_t heads = segments.count * job.H;
  int64_t warps = head_warps < Shape::kMaxWarps ? head_warps : Shape::kMaxWarps;
  while (warps > 1 && heads * ((head_warps + warps - 1) / warps) < launch.multiprocessors)
    warps = (warps + 1) / 2;
  const int64_t parts = (head_warps + warps - 1) / warps;

  // Every segment has room for one more state than it has chunks.
  const int64_t tokens = packed ? sequences.tokens : sequences.count * sequences.tokens;
  const int64_t longest = std::min(segments.length, sequences.tokens);
  const int64_t chunks = packed
                             ? sequences.tokens / Shape::kChunk + 2 * segments.count
                             : ((longest + Shape::kChunk - 1) / Shape::kChunk + 1) * segments.count;
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
      has_vector_rows<T>(job.grad_y),
      has_vector_rows<T>(job.r),
      has_vector_rows<T>(job.k),
      has_vector_rows<T>(job.v),
      has_vector_rows<T>(job.w),
      has_vector_rows<T>(job.initial),
      has_vector_rows<T>(borders.starts) && has_vector_rows<T>(job.checkpoints),
      has_vector_rows<T>(job.grad_final),
      has_vector_rows<T>(borders.ends),
      has_vector_rows<T>(job.grad_r),
      has_vector_rows<T>(job.grad_k),
      has_vector_rows<T>(grad_v_parts),
      has_vector_rows<T>(job.grad_w),
      has_vector_rows<T>(job.grad_initial)};
  kernel_of(warps).run(launch, heads * parts, job, segments, borders, vector, workspace);
  const int64_t size = tokens * job.H * job.N;
  if (parts > 1 && size > 0) {
    constexpr int kThreads = 256;
    sum_parts_kernel<<<blocks_for(size, kThreads), kThreads, 0, launch.stream>>>(
        grad_v, parts, tokens, sequences.tokens, job.H, job.N, job.grad_v);
    check_launched("sum_parts");
  }
  const int64_t rows = packed ? 1 : sequences.count;
  sum_heads(launch, grad_u, rows, segments.count / rows, job.H, job.N, job.grad_u);
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
