// The walk of a state alone, and the scan over segments. See segments.h.
#include "cuda/segments.h"

#include <cstdlib>

#include "cuda/chunk.cuh"
#include "cuda/chunked.cuh"

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
  float* ends;         // [unit][segment][N][N] or nullptr
  float* decays;       // [unit][segment][N], with ends
  float* checkpoints;  // [group][H][N][N] or nullptr
};

template <class E, int N, bool reverse>
__global__ void __launch_bounds__(2 * N)
    state_walk_kernel(const __grid_constant__ Walk walk, const __grid_constant__ Segments segments,
                      const float* starts,  // [unit][segment][N][N] or nullptr
                      const Results results) {
  constexpr int kThreads = 2 * N, K = 2;
  extern __shared__ __align__(16) char memory[];
  Shared<N>& shared = *reinterpret_cast<Shared<N>*>(memory);
  const Place at(walk.sequences, segments, walk.H);
  if (!at.span.valid) return;
  const int value = threadIdx.x / 32 * 16;

  StateTile<N> s;
  if (results.ends)
    fill_state<N>(s, 0.f);
  else if (starts)
    load_state<N>(s, starts + int64_t(blockIdx.x) * (N * N), N, value);
  else
    load_state<E, N>(s, walk.from, at.span.initial, at.h, value);

  const bool wide = walk.w.dtype == DType::f32;
  const Buffers<N, 2> staged(&shared + 1, wide);
  const auto stage_chunk = [&](int64_t first, int buffer) {
    stage<N, kThreads>(staged.tensor(buffer, 0), walk.x, at, first);
    stage<N, kThreads>(staged.tensor(buffer, 1), walk.v, at, first);
    stage_w<N, kThreads>(staged.w(buffer), walk.w, at, first);
    cp_async_commit();
  };
  const int64_t chunks = (at.last - at.first + kChunk - 1) / kChunk;
  const auto first_of = [&](int64_t c) {
    return at.first + kChunk * (reverse ? chunks - 1 - c : c);
  };
  Quad<E, N, kThreads> my;
  float decay[K] = {1.f, 1.f};  // of all the segment, in the threads of the first quad
  if (chunks) stage_chunk(first_of(0), 0);
  for (int64_t c = 0; c < chunks; c++) {
    const int64_t first = first_of(c);
    const int buffer = int(c % 2);
    cp_async_wait<0>();
    __syncthreads();
    if (c + 1 < chunks) stage_chunk(first_of(c + 1), buffer ^ 1);
    if (results.checkpoints && first % (kChunk * kGroup) == 0) {
      const int64_t position = at.span.b * walk.sequences.tokens + at.span.begin;
      const int64_t group = group_of(position, at.m, first);
      store_state<N>(s, results.checkpoints + (group * walk.H + at.h) * (N * N), N, value);
    }

    float x[kQuad][K], scale[K];
    my.load(x, staged.w(buffer), wide);
    my.decays(x, reverse ? at.decaying(first, walk.from.data) : at.tokens(first));
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

// From where each segment ends when it starts from zeros to where it starts, in place. One block
// per (sequence, head) and part of the matrix, one thread per element.
template <class E>
__global__ void scan_kernel(const __grid_constant__ Walk walk,
                            const __grid_constant__ Segments segments,
                            float* ends,            // [unit][segment][N][N]
                            const float* decays) {  // [unit][segment][N]
  const int64_t N = walk.N, parts = N * N / blockDim.x, unit = blockIdx.x / parts;
  const int64_t element = blockIdx.x % parts * blockDim.x + threadIdx.x, key = element / N;
  const int64_t m = unit / walk.H, h = unit % walk.H;
  const Span span = span_of(walk.sequences, m);
  if (!span.valid) return;
  const int64_t row = walk.reverse ? m : span.initial;
  float s = 0.f;
  if (walk.from.data && row >= 0) {
    const char* state = walk.from.matrix(row, h);
    const int64_t at = key * walk.from.stride_row + element % N;
    s = walk.from.dtype == DType::f32 ? reinterpret_cast<const float*>(state)[at]
                                      : E::low(reinterpret_cast<const uint16_t*>(state)[at]);
  }
  for (int64_t i = 0; i < segments.count; i++) {
    const int64_t segment = unit * segments.count + (walk.reverse ? segments.count - 1 - i : i);
    float& end = ends[segment * (N * N) + element];
    const float added = end;
    end = s;
    s = decays[segment * N + key] * s + added;
  }
}

template <class E, int N>
void walk_states(const Launch& launch, const Walk& walk, const Segments& segments,
                 const float* starts, const Results& results) {
  const bool wide = walk.w.dtype == DType::f32;
  const ChunkedKernel kernel = {
      "state_walk", walk.reverse ? state_walk_kernel<E, N, true> : state_walk_kernel<E, N, false>,
      2 * N, int(sizeof(Shared<N>)) + 2 * Buffers<N, 2>::bytes(wide)};
  kernel.run(launch, walk.sequences.count * walk.H * segments.count, walk, segments, starts,
             results);
}

}  // namespace

Segments segments_of(const Launch& launch, const Sequences& sequences, int64_t H,
                     int64_t blocks_each, const Costs& costs) {
  constexpr int64_t kGroupTokens = kChunk * kGroup;
  const auto in_groups = [](int64_t tokens) {
    return (tokens + kGroupTokens - 1) / kGroupTokens * kGroupTokens;
  };
  const int64_t T = std::max<int64_t>(sequences.tokens, 1);
  const auto of_length = [&](int64_t length) {
    return Segments{(T + length - 1) / length, length};
  };
  if (const char* forced = std::getenv("RWKV6_CUDA_SEGMENT"))
    return of_length(in_groups(std::clamp<int64_t>(std::atoll(forced), 1, T)));

  const int64_t each = std::max<int64_t>(blocks_each, 1), room = launch.multiprocessors * each;
  const bool packed = sequences.cu_seqlens.data;
  const int64_t units = std::max<int64_t>(packed ? H : sequences.count * H, 1);
  const auto cost = [&](const Segments& segments) {
    const int64_t blocks = units * segments.count;
    const int64_t most_filled = (blocks + launch.multiprocessors - 1) / launch.multiprocessors;
    const double full = double(std::min(most_filled, each)) / double(each);
    const double waves = double((blocks + room - 1) / room);
    const double tokens =
        waves * (double(segments.length) + costs.begin) * (1 + costs.crowding * full * full);
    if (segments.count == 1) return tokens;
    return tokens * costs.walk + costs.scan + costs.scan_each * double(segments.count);
  };
  Segments best = of_length(in_groups(T));
  if (packed && sequences.count * H >= room) return best;
  // more segments than this only make more waves of the same blocks
  const int64_t most = std::min(T / kGroupTokens, 8 * room / units + 1);
  for (int64_t count = 2; count <= most; count++) {
    const Segments segments = of_length(in_groups((T + count - 1) / count));
    if (cost(segments) < cost(best)) best = segments;
  }
  return best;
}

const float* segment_starts(const Launch& launch, const Walk& walk, const Segments& segments) {
  const int64_t units = walk.sequences.count * walk.H;
  float* ends = launch.workspace<float>(units * segments.count * walk.N * walk.N);
  float* decays = launch.workspace<float>(units * segments.count * walk.N);
  for_chunked(walk.x.dtype, walk.N, [&](auto element, auto size) {
    using E = decltype(element);
    constexpr int N = decltype(size)::value, kThreads = 256;
    walk_states<E, N>(launch, walk, segments, nullptr, {ends, decays, nullptr});
    const ChunkedKernel scan = {"scan", scan_kernel<E>, kThreads, 0};
    scan.run(launch, units * (N * N / kThreads), walk, segments, ends, decays);
  });
  return ends;
}

const float* checkpoints(const Launch& launch, const Walk& walk, const Segments& segments,
                         const float* starts) {
  const Sequences& all = walk.sequences;
  const int64_t tokens = all.cu_seqlens.data ? all.tokens : all.count * all.tokens;
  float* result =
      launch.workspace<float>(group_of(tokens, all.count, 0) * walk.H * walk.N * walk.N);
  for_chunked(walk.x.dtype, walk.N, [&](auto element, auto size) {
    walk_states<decltype(element), decltype(size)::value>(launch, walk, segments, starts,
                                                          {nullptr, nullptr, result});
  });
  return result;
}

}  // namespace rwkv6::cuda
