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

// Every architecture from 8.0 on has that much shared memory for a block.
constexpr int kLeastSharedMemory = 99 * 1024;

// A kernel, and what its blocks take; shared_bytes may be more than a kernel has without asking.
template <class... Parameters>
struct ChunkedKernel {
  const char* name;
  void (*kernel)(Parameters...);
  int threads, shared_bytes;

  // How many of its blocks a multiprocessor holds; 0 where not even one fits.
  int blocks_each(const Launch& launch) const {
    int blocks = 0;
    if (shared_bytes > launch.shared_memory) return blocks;
    allow_shared_memory();
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes),
          name);
    return blocks;
  }

  template <class... Arguments>
  void run(const Launch& launch, int64_t blocks, const Arguments&... arguments) const {
    if (blocks == 0) return;
    allow_shared_memory();
    kernel<<<blocks_for(blocks), threads, shared_bytes, launch.stream>>>(arguments...);
    check_launched(name);
  }

 private:
  void allow_shared_memory() const {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          name);
  }
};

}  // namespace rwkv6::cuda
