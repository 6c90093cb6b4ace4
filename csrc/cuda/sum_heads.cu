// Gradients of u: a sum over sequences, always in the same order.
#include "cuda/launch.h"
#include "cuda/load.cuh"

namespace rwkv6::cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_heads_kernel(const T* parts, int64_t rows, int64_t count, int64_t H, int64_t N, Heads out) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = index / (H * N), at = index % (H * N);
  if (row >= rows) return;
  parts += row * count * H * N + at;
  T sum = 0;
#pragma unroll 8
  for (int64_t p = 0; p < count; p++) sum += parts[p * H * N];
  store_element(out.row(at / N, row), out.dtype, at % N, sum);
}

}  // namespace

template <class T>
void sum_heads(const Launch& launch, const T* parts, int64_t sequences, int64_t count, int64_t H,
               int64_t N, Heads out) {
  const int64_t rows = out.stride_b ? sequences : 1;
  if (rows * H * N == 0) return;
  const unsigned blocks = blocks_for(rows * H * N, kThreads);
  sum_heads_kernel<T>
      <<<blocks, kThreads, 0, launch.stream>>>(parts, rows, sequences / rows * count, H, N, out);
  check_launched("sum_heads");
}

template void sum_heads(const Launch&, const float*, int64_t, int64_t, int64_t, int64_t, Heads);
template void sum_heads(const Launch&, const double*, int64_t, int64_t, int64_t, int64_t, Heads);

}  // namespace rwkv6::cuda
