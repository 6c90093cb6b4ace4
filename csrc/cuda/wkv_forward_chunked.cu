// The chunked forward: see chunk.cuh. One block walks the chunks of a segment, with the state in
// its registers; every warp has 16 values of it.
#include "cuda/chunk.cuh"
#include "cuda/chunked.cuh"

namespace rwkv6::cuda {
namespace {

template <int N>
struct Shared {
  static constexpr int K = 2;
  Rows<N> levels[kLevels], r, k;  // r decayed from the chunk's beginning, k to its end
  union {
    float products[kQuads][N];  // until every thread has loaded them
    Pairs pairs;                // from then on
  };
  float total[N];
  Bonus<N, K> bonus;
  // and behind it two buffers of r, k, v and w
  using Staged = Buffers<N, 3>;
  static constexpr int bytes(bool wide) { return int(sizeof(Shared)) + 2 * Staged::bytes(wide); }
};
static_assert(sizeof(Shared<32>) % 16 == 0 && sizeof(Shared<64>) % 16 == 0 &&
              sizeof(Shared<128>) % 16 == 0 && Shared<128>::bytes(true) <= kLeastSharedMemory);

template <class E, int N>
__global__ void __launch_bounds__(2 * N)
    forward_chunked_kernel(const __grid_constant__ ForwardJob job,
                           const __grid_constant__ Segments segments,
                           const float* starts) {  // [segment][H][N][N] or nullptr
  constexpr int kThreads = 2 * N, K = 2;
  extern __shared__ __align__(16) char memory[];
  Shared<N>& shared = *reinterpret_cast<Shared<N>*>(memory);
  const Place at(job.sequences, segments, job.H);
  const int warp = threadIdx.x / 32, value = 16 * warp;

  if (!at.span.valid || at.span.padding) {
    fill_rows<N>(job.y, at, !at.span.valid);
    if (!at.span.valid && at.segment == 0 && at.span.final >= 0)
      fill_matrix<N>(f32_matrix(job.final, at.span.final, at.h), job.final.stride_row, NAN);
    return;
  }
  StateTile<N> s;
  if (starts && at.cut)
    load_state<N>(s, starts + int64_t(blockIdx.x) * (N * N), N, value);
  else
    load_state<E, N>(s, job.initial, at.span.initial, at.h, value);

  const bool wide = job.w.dtype == DType::f32;
  const typename Shared<N>::Staged staged(&shared + 1, wide);
  const Source<N> from_r(job.r, at, threadIdx.x), from_k(job.k, at, threadIdx.x),
      from_v(job.v, at, threadIdx.x), from_w(job.w, at, threadIdx.x, wide);
  const Target to_y(job.y, at, value);
  const int length = int(at.last - at.first);
  const auto stage_chunk = [&](int offset, int buffer) {
    const int tokens = length - offset;
    from_r.template stage<kThreads>(staged.tensor(buffer, 0), offset, tokens);
    from_k.template stage<kThreads>(staged.tensor(buffer, 1), offset, tokens);
    from_v.template stage<kThreads>(staged.tensor(buffer, 2), offset, tokens);
    from_w.template stage<kThreads>(staged.w(buffer), offset, tokens, wide);
    cp_async_commit();
  };
  Quad<E, N, kThreads> my;
  float u[K];
  load_u<E, K>(u, job.u, at.h, at.span.b, my.key);
  if (length > 0) stage_chunk(0, 0);

  int buffer = 0;
  for (int offset = 0; offset < length; offset += kChunk, buffer ^= 1) {
    const uint32_t* raw_v = staged.tensor(buffer, 2);
    cp_async_wait<0>();
    __syncthreads();
    if (offset + kChunk < length) stage_chunk(offset + kChunk, buffer ^ 1);
    store_checkpoint<N>(s, job.checkpoints, job.sequences, at, at.first + offset, value);

    float r[kQuad][K], k[kQuad][K], x[kQuad][K], scale[K];
    my.load(x, staged.w(buffer), wide);
    my.decays(x, length - offset);
    my.share_products(shared.products);
    my.load(r, staged.tensor(buffer, 0));
    my.load(k, staged.tensor(buffer, 1));
    share_bonus<E, N, kThreads, K>(shared.bonus, my, r, k, u);
    __syncthreads();
    my.load_products(shared.products);
    {
      float from_before[kQuad][K], to_after[kQuad][K];
      multiply(from_before, r, my.before);
      multiply(to_after, k, my.after);
      store_levels<E, N, kThreads, K>(shared.levels, my, r, k, from_before, to_after);
      my.product(scale, 0, my.quad);
      my.store_tf32(shared.r, from_before, scale);
      my.product(scale, my.quad + 1, kQuads);
      my.store(shared.k, to_after, scale);
    }
    if (my.quad == 0) {
      my.product(scale, 0, kQuads);
#pragma unroll
      for (int i = 0; i < K; i++) shared.total[my.key + i] = scale[i];
    }
    __syncthreads();

    for (int level = warp; level < kLevels; level += kThreads / 32)
      pair_level<E, N, false>(shared.pairs, level, shared.levels[level]);
    if (threadIdx.x < kChunk)
      shared.pairs[threadIdx.x][threadIdx.x] = pair_operand<E>(bonus_of(shared.bonus, threadIdx.x));
    OutputTile y = {};
    ValueTile v;
    load_values<E, N>(v, raw_v, value);
    times_state<E, N>(y, shared.r, s);
    update_state<N>(s, shared.total, shared.k, v);
    __syncthreads();

    times_values<E, N, false>(y, shared.pairs, v, raw_v, value);
    to_y.template store<E>(y, offset, length - offset);
  }
  if (at.is_end())
    store_state<N>(s, f32_matrix(job.final, at.span.final, at.h), job.final.stride_row, value);
}

constexpr SegmentCosts kCosts = {
    .sharing = 0.4, .start = 48, .walk = 1.8, .scan = 224, .segment = 6, .multiple = 4 * kChunk};

// Where only the final state is wanted: the walk of the state alone goes through every segment once.
constexpr SegmentCosts kStateCosts = {.sharing = kCosts.sharing,
                                      .start = kCosts.start,
                                      .walk = 1,
                                      .scan = kCosts.scan,
                                      .segment = kCosts.segment,
                                      .multiple = kCosts.multiple};

template <class E, int N>
void run(const Launch& launch, const ForwardJob& job) {
  const Kernel kernel = {"forward_chunked", forward_chunked_kernel<E, N>, 2 * N,
                         Shared<N>::bytes(job.w.dtype == DType::f32)};
  const Segments segments = segments_of(launch, job.sequences, job.H, kernel.blocks_each(launch),
                                        job.y.data ? kCosts : kStateCosts);
  const Walk walk = {Family::chunked, job.sequences, job.H,       job.N, job.k,
                     job.v,           job.w,         job.initial, false};
  if (!job.y.data) {
    segment_starts<float>(launch, walk, segments, job.final);
    return;
  }
  const float* starts = nullptr;
  if (segments.cuts(job.sequences)) starts = segment_starts<float>(launch, walk, segments);
  kernel.run(launch, segments.count * job.H, job, segments, starts);
}

}  // namespace

void forward_chunked(const Launch& launch, const ForwardJob& job) {
  for_chunked(job.k.dtype, job.N, [&](auto element, auto size) {
    run<decltype(element), decltype(size)::value>(launch, job);
  });
}

}  // namespace rwkv6::cuda
