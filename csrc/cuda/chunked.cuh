// How the chunked kernels are launched.
#pragma once

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/mma.cuh"

namespace rwkv6::cuda {

// f(Bf16 or F16, integral_constant N) for a dtype and head size.
template <class F>
void for_chunked(DType dtype, int64_t N, const F& f) {
  const auto sized = [&](auto element) {
    if (N == 32) return f(element, std::integral_constant<int, 32>());
    if (N == 64) return f(element, std::integral_constant<int, 64>());
    return f(element, std::integral_constant<int, 128>());
  };
  dtype == DType::bf16 ? sized(Bf16()) : sized(F16());
}

// Launches kernel(arguments...) with more shared memory than a kernel has without asking.
template <class... Arguments, class... Given>
void launch_chunked(const char* name, void (*kernel)(Arguments...), const Launch& launch,
                    int64_t blocks, int threads, int shared_bytes, const Given&... arguments) {
  if (blocks == 0) return;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  kernel<<<blocks_for(blocks), threads, shared_bytes, launch.stream>>>(arguments...);
  check_launched(name);
}

}  // namespace rwkv6::cuda
