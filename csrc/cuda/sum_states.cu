// Gradients of initial states that several sequences start from: sums in the sequences' order.
#include "cuda/launch.h"
#include "cuda/load.cuh"
#include "cuda/warp.cuh"

namespace rwkv6::cuda {
namespace {

constexpr int kThreads = 256;

// The row that sequence m starts from; any value where state_map is wrong.
__device__ int64_t row_of(const Sequences& sequences, int64_t m) {
  if (sequences.state_map.data) return sequences.state_map[m];
  return sequences.states == 1 ? 0 : m;
}

// Chains the sequences that start from the same row: next[s], s < S, is the first that starts from
// row s, next[S + m] the one after m with m's row, and `count` ends a chain. A warp finds each.
__global__ void __launch_bounds__(kThreads) chain_kernel(Sequences sequences, int64_t* next) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32, S = sequences.states;
  if (i >= S + sequences.count) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = i < S ? i : row_of(sequences, i - S);
  int64_t m = i < S ? 0 : i - S + 1;
  for (; m < sequences.count; m += 32) {
    const bool same = m + lane < sequences.count && row_of(sequences, m + lane) == row;
    const unsigned found = __ballot_sync(kAllLanes, same);
    if (found) {
      m += __ffs(found) - 1;
      break;
    }
  }
  if (lane == 0) next[i] = m < sequences.count ? m : sequences.count;
}

// out[s] = the sum of parts[m] over the sequences m of row s, in their order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_states_kernel(const T* parts, const int64_t* next, int64_t S, int64_t count, int64_t H,
                      int64_t N, States out) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t size = H * N * N, s = index / size, element = index % size;
  if (s >= S) return;
  T sum = 0;
  for (int64_t m = next[s]; m < count; m = next[S + m]) sum += parts[m * size + element];
  const int64_t h = element / (N * N), i = element / N % N, j = element % N;
  store_element(out.matrix(s, h), out.dtype, i * out.stride_row + j, sum);
}

}  // namespace

template <class T>
void sum_states(const Launch& launch, const BackwardJob& job, const States& out) {
  const int64_t S = job.sequences.states, count = job.sequences.count;
  if (S == 0) return;
  int64_t* next = launch.workspace<int64_t>(S + count);
  chain_kernel<<<blocks_for(32 * (S + count), kThreads), kThreads, 0, launch.stream>>>(
      job.sequences, next);
  check_launched("chain");
  sum_states_kernel<<<blocks_for(S * job.H * job.N * job.N, kThreads), kThreads, 0,
                      launch.stream>>>(reinterpret_cast<const T*>(job.grad_initial.data), next, S,
                                       count, job.H, job.N, out);
  check_launched("sum_states");
}

template void sum_states<float>(const Launch&, const BackwardJob&, const States&);
template void sum_states<double>(const Launch&, const BackwardJob&, const States&);

}  // namespace rwkv6::cuda
