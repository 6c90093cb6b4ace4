// The chunked kernels' walk of a state alone, and the scan over segments. See segments.h.
#include "cuda/segments.h"

#include <cstdlib>

#include "cuda/chunk.cuh"
#include "cuda/chunked.cuh"
#include "cuda/load.cuh"

namespace rwkv6::cuda {
namespace {

template <int N>
struct Shared {
  Rows<N> rows;  // of x, decayed to the chunk's end (backwards: from its beginning)
  float products[kQuads][N], total[N];
  // and behind it two buffers of x, v and w
};
static_assert(sizeof(Shared<32>) % 16 == 0 && sizeof(Shared<64>) % 16 == 0 &&
              sizeof(Shared<128>) % 16 == 0);

// What the walk leaves behind: the segment's end from zeros and its decay, or checkpoints.
struct Results {
  float* ends;         // [segment][H][N][N] of the sequences with several, or nullptr
  float* decays;       // [segment][H][N], with ends: to decay.cuh changes that keep nothing
  bool uncut;          // ends and decays of the other sequences as well
  States checkpoints;  // or absent
};

// Of a multiprocessor: as many as leave (next to) no registers in memory.
template <int N, bool reverse>
constexpr int kWalkBlocks = N == 32    ? 10
                            : N == 128 ? 2
                            : reverse  ? 4
                                       : 5;

template <class E, int N, bool reverse>
__global__ void __launch_bounds__(2 * N, kWalkBlocks<N, reverse>)
    state_walk_kernel(const __grid_constant__ Walk walk, const __grid_constant__ Segments segments,
                      const float* starts,  // [segment][H][N][N] or nullptr
                      const Results results) {
  constexpr int kThreads = 2 * N, K = 2;
  extern __shared__ __align__(16) char memory[];
  Shared<N>& shared = *reinterpret_cast<Shared<N>*>(memory);
  const Place at(walk.sequences, segments, walk.H);
  if (!at.span.valid || (results.ends && !at.cut && !results.uncut)) return;
  const int value = threadIdx.x / 32 * 16;

  StateTile<N> s;
  if (results.ends)
    fill_state<N>(s, 0.f);
  else if (starts && at.cut)
    load_state<N>(s, starts + int64_t(blockIdx.x) * (N * N), N, value);
  else
    load_state<E, N>(s, walk.from, at.span.initial, at.h, value);

  const bool wide = walk.w.dtype == DType::f32;
  const Buffers<N, 2> staged(&shared + 1, wide);
  const Source<N> from_x(walk.x, at, threadIdx.x), from_v(walk.v, at, threadIdx.x),
      from_w(walk.w, at, threadIdx.x, wide);
  const int length = int(at.last - at.first);
  const auto stage_chunk = [&](int offset, int buffer) {
    const int tokens = length - offset;
    from_x.template stage<kThreads>(staged.tensor(buffer, 0), offset, tokens);
    from_v.template stage<kThreads>(staged.tensor(buffer, 1), offset, tokens);
    from_w.template stage<kThreads>(staged.w(buffer), offset, tokens, wide);
    cp_async_commit();
  };
  const int chunks = (length + kChunk - 1) / kChunk;
  const auto offset_of = [&](int c) { return kChunk * (reverse ? chunks - 1 - c : c); };
  Quad<E, N, kThreads> my;
  float decay[K] = {1.f, 1.f};  // of all the segment, in the threads of the first quad
  if (chunks) stage_chunk(offset_of(0), 0);
  for (int c = 0; c < chunks; c++) {
    const int offset = offset_of(c);
    const int buffer = c % 2;
    cp_async_wait<0>();
    __syncthreads();
    if (c + 1 < chunks) stage_chunk(offset_of(c + 1), buffer ^ 1);
    store_checkpoint<N>(s, results.checkpoints, walk.sequences, at, at.first + offset, value);

    float x[kQuad][K], scale[K];
    my.load(x, staged.w(buffer), wide);
    my.decays(x, reverse ? at.decaying(at.first + offset, walk.from.data) : length - offset);
    my.share_products(shared.products);
    my.load(x, staged.tensor(buffer, 0));
    __syncthreads();
    my.load_products(shared.products);
    multiply(x, x, reverse ? my.before : my.after);
    my.product(scale, reverse ? 0 : my.quad + 1, reverse ? my.quad : kQuads);
    my.store(shared.rows, x, scale);
    if (my.quad == 0) {
      my.product(scale, 0, kQuads);
#pragma unroll
      for (int i = 0; i < K; i++) shared.total[my.key + i] = scale[i], decay[i] *= scale[i];
    }
    ValueTile v;
    load_values<E, N>(v, staged.tensor(buffer, 1), value);
    __syncthreads();
    update_state<N>(s, shared.total, shared.rows, v);
  }

  if (!results.ends) return;
  store_state<N>(s, results.ends + int64_t(blockIdx.x) * (N * N), N, value);
  if (my.quad == 0)
#pragma unroll
    for (int i = 0; i < K; i++) results.decays[int64_t(blockIdx.x) * N + my.key + i] = decay[i];
}

constexpr int kScanThreads = 256;

// From where each segment ends when it starts from zeros to where it starts, in place, for the
// sequences with several segments. With `final` for all sequences, and the end of the last segment
// goes there. One block per (sequence, head) and part of the matrix, one thread per element.
template <class T>
__global__ void __launch_bounds__(kScanThreads, 6)
    scan_kernel(const __grid_constant__ Walk walk, const __grid_constant__ Segments segments,
                T* ends,               // [segment][H][N][N]
                const T* changes,      // [segment][H][N], by decays: see decay.cuh
                const States final) {  // [sequence][H][N][N] of T, or absent
  const int N = int(walk.N), parts = (N * N + kScanThreads - 1) / kScanThreads;
  const int element = int(blockIdx.x) % parts * kScanThreads + int(threadIdx.x);
  const int key = element / N, value = element % N;
  const int64_t unit = blockIdx.x / parts, m = unit / walk.H, h = unit % walk.H;
  const Span span = span_of(walk.sequences, m);
  if (element >= N * N) return;
  if (!final.data && (!span.valid || span.length <= segments.length)) return;
  const int64_t first = first_segment(walk.sequences, segments, m);
  const int64_t count = span.valid ? (span.length + segments.length - 1) / segments.length : 0;
  const int64_t row = walk.reverse ? m : span.initial;
  T s = span.valid ? T(0) : T(NAN);
  if (walk.from.data && row >= 0)
    s = load_element<T>(walk.from.matrix(row, h), walk.from.dtype,
                        key * walk.from.stride_row + value);
  for (int64_t i = 0; i < count; i++) {
    const int64_t segment = first + (walk.reverse ? count - 1 - i : i), at = segment * walk.H + h;
    T& end = ends[at * (N * N) + element];
    const T added = end, change = changes[at * N + key];
    end = s;
    s = kept_of(change) * s + (change * s + added);
  }
  if (final.data && span.final >= 0)
    reinterpret_cast<T*>(final.matrix(span.final, h))[key * final.stride_row + value] = s;
}

template <class E, int N>
void walk_states(const Launch& launch, const Walk& walk, const Segments& segments,
                 const float* starts, const Results& results) {
  const bool wide = walk.w.dtype == DType::f32;
  const Kernel kernel = {
      "state_walk", walk.reverse ? state_walk_kernel<E, N, true> : state_walk_kernel<E, N, false>,
      2 * N, int(sizeof(Shared<N>)) + 2 * Buffers<N, 2>::bytes(wide)};
  kernel.run(launch, segments.count * walk.H, walk, segments, starts, results);
}

}  // namespace

Segments segments_of(const Launch& launch, const Sequences& sequences, int64_t H,
                     int64_t blocks_each, const SegmentCosts& costs) {
  constexpr int64_t kShortestPacked = 256;
  const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const bool packed = sequences.cu_seqlens.data;
  const int64_t T = std::max<int64_t>(sequences.tokens, 1);
  const int64_t multiprocessors = launch.multiprocessors, room = multiprocessors * blocks_each;
  const auto cost = [&](int64_t length) {
    const int64_t count = up(T, length), blocks = sequences.count * H * count;
    const double full = double(std::min(blocks_each, up(blocks, multiprocessors))) / blocks_each;
    const double tokens = up(blocks, room) * (length + costs.start);
    const double walked = tokens * (1 + costs.sharing * full * full);
    return count == 1 ? walked : walked * costs.walk + costs.scan + count * costs.segment;
  };
  int64_t length = up(T, costs.multiple) * costs.multiple;
  const bool few = packed && sequences.tokens < kFewTokens * sequences.count;
  if (const char* forced = std::getenv("RWKV6_CUDA_SEGMENT")) {
    length = std::min(length, std::max<int64_t>(std::atoll(forced), 1));
  } else if (packed && !few) {
    length = std::min(length, std::max(up(T * H, room), kShortestPacked));
  } else if (!packed) {
    // more segments than twice what there is room for would only wait for each other
    const int64_t units = std::max<int64_t>(sequences.count * H, 1);
    const int64_t most = std::min(up(T, costs.multiple), 2 * room / units + 1);
    for (int64_t count = 2; count <= most; count++) {
      const int64_t shorter = up(up(T, count), costs.multiple) * costs.multiple;
      if (cost(shorter) < cost(length)) length = shorter;
    }
  }
  length = up(length, costs.multiple) * costs.multiple;
  if (packed) return {sequences.count + (length < T ? T / length : 0), length};
  return {up(T, length) * sequences.count, length};
}

template <class T>
const T* segment_starts(const Launch& launch, const Walk& walk, const Segments& segments,
                        const States& final) {
  const int64_t units = walk.sequences.count * walk.H, blocks = segments.count * walk.H;
  const int64_t N = walk.N, parts = (N * N + kScanThreads - 1) / kScanThreads;
  T* ends = launch.workspace<T>(blocks * N * N);
  T* changes = launch.workspace<T>(blocks * N);
  if (walk.family == Family::recurrent) {
    state_sums(launch, walk, segments, final.data != nullptr, ends, changes);
  } else if constexpr (std::is_same_v<T, float>) {
    for_chunked(walk.x.dtype, N, [&](auto element, auto size) {
      walk_states<decltype(element), decltype(size)::value>(
          launch, walk, segments, nullptr, {ends, changes, final.data != nullptr, {}});
    });
  }
  const Kernel scan = {"scan", scan_kernel<T>, kScanThreads, 0};
  scan.run(launch, units * parts, walk, segments, ends, changes, final);
  return ends;
}

template const float* segment_starts(const Launch&, const Walk&, const Segments&, const States&);
template const double* segment_starts(const Launch&, const Walk&, const Segments&, const States&);

States checkpoints(const Launch& launch, const Walk& walk, const Segments& segments,
                   const float* starts) {
  const int64_t H = walk.H, N = walk.N, size = walk.sequences.checkpoints() * H * N * N;
  const States result = {reinterpret_cast<char*>(launch.workspace<float>(size)), DType::f32,
                         H * N * N, N * N, N};
  if (!result.data) return result;  // no sequence is so long
  for_chunked(walk.x.dtype, N, [&](auto element, auto size) {
    walk_states<decltype(element), decltype(size)::value>(launch, walk, segments, starts,
                                                          {nullptr, nullptr, false, result});
  });
  return result;
}

}  // namespace rwkv6::cuda
