// The way to the CUDA kernels, without CUDA's headers: dispatch.cu lies behind it, or absent.cpp in
// a library that was built without nvcc.
#pragma once

#include "job.h"
#include "rwkv6.h"

namespace rwkv6::cuda {

// The compute capabilities that the kernels were compiled for, such as "8.0, 9.0"; NULL without.
const char* architectures();

// Why the kernels cannot run, as far as can be told without a GPU's help; NULL otherwise. Valid until
// the thread's next call.
const char* problem();

// The calling thread's current device; -1 without one.
int current_device();

// Launch the kernels of a call whose arguments are checked, on the caller's stream; `device` is the
// tensors'. Nothing waits for the GPU. They throw std::runtime_error with a message, or
// std::bad_alloc.
void forward(const rwkv6_context* context, int device, ForwardJob job);

// The sum over the sequences that start from each row of job.grad_initial is taken in their order.
void backward(const rwkv6_context* context, int device, BackwardJob job);

}  // namespace rwkv6::cuda
