// What a call's kernels are launched with: the caller's stream and memory.
#pragma once

#include <cuda_runtime_api.h>

#include <new>
#include <stdexcept>
#include <string>

#include "job.h"
#include "rwkv6.h"

namespace rwkv6::cuda {

// What CUDA refused; the message names the kernel and what to do.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Launch {
  const rwkv6_context* context;
  cudaStream_t stream;
  // Of the current device, which is the tensors':
  int multiprocessors;
  int shared_memory;  // bytes, the most that a block gets

  // Device memory for n elements, 256-byte aligned and uninitialised, which lives as long as the
  // kernels launched by this call. Throws std::bad_alloc.
  template <class T>
  T* workspace(int64_t n) const {
    if (n == 0) return nullptr;
    void* memory = context->allocate(context->pool, size_t(n) * sizeof(T));
    if (!memory) throw std::bad_alloc();
    return static_cast<T*>(memory);
  }
};

// Throws what CUDA refused, with the function's or kernel's name.
void check(cudaError_t error, const char* what);
// The same for the launch of `kernel` just before.
void check_launched(const char* kernel);

// How many blocks of a grid's first dimension do so much work. Throws where CUDA allows fewer.
unsigned blocks_for(int64_t work, int64_t per_block = 1);

// A kernel, and what its blocks take; shared_bytes may be more than a kernel has without asking.
template <class... Parameters>
struct Kernel {
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

// The kernel families. All of them: any strides with contiguous rows, any options.
//   recurrent: every dtype and head size; f32 inputs in f32, f64 in f64
//   chunked: bf16 and f16 of head size 32, 64 and 128 on tensor cores, rows aligned to 16 bytes
enum class Family { recurrent, chunked };
// Packed sequences with fewer tokens on average are taken for short ones: about two chunks.
constexpr int64_t kFewTokens = 32;
void forward_recurrent(const Launch& launch, const ForwardJob& job);
void backward_recurrent(const Launch& launch, const BackwardJob& job);
void forward_chunked(const Launch& launch, const ForwardJob& job);
void backward_chunked(const Launch& launch, const BackwardJob& job);

// Adds up parts [sequences, count, H, N] of T, f32 or f64, in their order: all of them, or those of
// each sequence by themselves where every batch row has its own [H, N] in `out`.
template <class T>
void sum_heads(const Launch& launch, const T* parts, int64_t sequences, int64_t count, int64_t H,
               int64_t N, Heads out);

// out[s] = the sum of job.grad_initial[m], of T, over the sequences m that start from row s.
template <class T>
void sum_states(const Launch& launch, const BackwardJob& job, const States& out);

}  // namespace rwkv6::cuda
