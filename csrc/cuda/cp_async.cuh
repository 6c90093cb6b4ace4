// Copies from global to shared memory that a thread starts and later waits for.
#pragma once

#include <cstdint>

namespace rwkv6::cuda {

__device__ inline uint32_t shared_address(const void* x) {
  return uint32_t(__cvta_generic_to_shared(x));
}

// Starts to copy 4, 8 or 16 bytes; those of 16 pass the L1 cache by.
template <int bytes>
__device__ inline void cp_async(void* shared, const void* global) {
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
                 "l"(global)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(bytes)
                 : "memory");
}

// Starts to copy the first `given` of 16 bytes, 16 or 0; the rest becomes zeros.
__device__ inline void cp_async_or_zeros(void* shared, const void* global, int given) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(given)
               : "memory");
}

// The copies started since the last commit become a group.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` groups of this thread are under way.
template <int pending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace rwkv6::cuda
