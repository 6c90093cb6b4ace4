// Which of the chunked kernels are launched.
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

// Every architecture from 8.0 on has that much shared memory for a block.
constexpr int kLeastSharedMemory = 99 * 1024;

}  // namespace rwkv6::cuda
