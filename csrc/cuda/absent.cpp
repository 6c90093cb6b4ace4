// Stands in for the CUDA kernels in a library that was built without them.
#include <stdexcept>

#include "cuda/dispatch.h"

namespace rwkv6::cuda {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error(
      "r: it is on a GPU, but this library was built without CUDA kernels; build it again where "
      "nvcc is found (CUDA_HOME or PATH), with RWKV6_CUDA=1");
}

}  // namespace

const char* architectures() { return nullptr; }

const char* problem() { return "the library was built without CUDA"; }

int current_device() { return -1; }

void forward(const rwkv6_context*, int, ForwardJob) { refuse(); }

void backward(const rwkv6_context*, int, BackwardJob) { refuse(); }

}  // namespace rwkv6::cuda
