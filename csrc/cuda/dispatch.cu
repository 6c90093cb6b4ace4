// From a checked call to the kernels: the device, the workspace, which family of kernels, and the
// small kernels around them.
#include "cuda/dispatch.h"

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <initializer_list>

#include "cuda/launch.h"

namespace rwkv6::cuda {
namespace {

constexpr int kThreads = 256;

// Makes the tensors' device the thread's current one while a call runs.
class CurrentDevice {
  int before_ = 0, device_;

 public:
  explicit CurrentDevice(int device) : device_(device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~CurrentDevice() noexcept(false) {
    if (before_ == device_) return;
    const cudaError_t error = cudaSetDevice(before_);
    if (std::uncaught_exceptions() == 0) check(error, "cudaSetDevice");
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

Launch launch_on(const rwkv6_context* context, int device) {
  if (!context || !context->allocate)
    throw CudaError(
        "context: tensors on a GPU need one with the stream to launch on and `allocate`");
  return {context, static_cast<cudaStream_t>(context->stream),
          attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

__global__ void __launch_bounds__(kThreads)
    check_cu_seqlens_kernel(Indices cu_seqlens, int64_t count, int64_t tokens, int* bad) {
  bool wrong = threadIdx.x == 0 && (cu_seqlens[0] != 0 || cu_seqlens[count] != tokens);
  for (int64_t m = threadIdx.x; m < count; m += kThreads)
    wrong |= cu_seqlens[m] > cu_seqlens[m + 1];
  wrong = __syncthreads_or(wrong);
  if (threadIdx.x == 0) *bad = wrong;
}

void check_cu_seqlens(const Launch& launch, Sequences& sequences) {
  if (!sequences.cu_seqlens.data) return;
  int* bad = launch.workspace<int>(1);
  check_cu_seqlens_kernel<<<1, kThreads, 0, launch.stream>>>(sequences.cu_seqlens, sequences.count,
                                                             sequences.tokens, bad);
  check_launched("check_cu_seqlens");
  sequences.bad_cu_seqlens = bad;
}

// What 16-byte loads of whole rows need.
bool aligned(const Tokens& x) {
  const int64_t size = size_of(x.dtype);
  const int64_t all = int64_t(reinterpret_cast<uintptr_t>(x.data)) | x.stride_b * size |
                      x.stride_t * size | x.stride_h * size;
  return all % 16 == 0;
}

// Which kernels compute a call: the chunked ones wherever they can, from about two of their chunks
// on; below that, loading and storing the state is most of the work, which the recurrent ones do at
// the speed of memory. RWKV6_CUDA_KERNEL forces one family.
Family choose(const Sequences& sequences, DType dtype, int64_t N,
              std::initializer_list<Tokens> rows) {
  const char* obstacle = nullptr;
  if (dtype != DType::bf16 && dtype != DType::f16) obstacle = "inputs are not bfloat16 or float16";
  if (N != 32 && N != 64 && N != 128) obstacle = "the head size is not 32, 64 or 128";
  for (const Tokens& x : rows)
    if (!aligned(x)) obstacle = "a row of a tensor is not aligned to 16 bytes";
  const char* variable = getenv("RWKV6_CUDA_KERNEL");
  const std::string forced = variable ? variable : "";
  if (forced == "recurrent") return Family::recurrent;
  if (forced == "chunked") {
    if (obstacle) throw CudaError("RWKV6_CUDA_KERNEL=chunked: " + std::string(obstacle));
    return Family::chunked;
  }
  if (!forced.empty())
    throw CudaError("RWKV6_CUDA_KERNEL=" + forced + ": expected recurrent or chunked");
  const bool few = sequences.tokens < kFewTokens ||
                   (sequences.cu_seqlens.data && sequences.tokens / sequences.count < kFewTokens);
  return obstacle || few ? Family::recurrent : Family::chunked;
}

}  // namespace

const char* architectures() {
#define RWKV6_TEXT_OF(...) #__VA_ARGS__
#define RWKV6_TEXT(...) RWKV6_TEXT_OF(__VA_ARGS__)
  static const std::string text = [] {  // from 800,900
    std::string result;
    const char* digit = RWKV6_TEXT(__CUDA_ARCH_LIST__);
    while (*digit) {
      const int number = int(strtol(digit, const_cast<char**>(&digit), 10));
      result += (result.empty() ? "" : ", ") + std::to_string(number / 100) + "." +
                std::to_string(number / 10 % 10);
      if (*digit) digit++;
    }
    return result;
  }();
  return text.c_str();
}

const char* problem() {
  thread_local std::string text;
  int driver = 0, runtime = 0;  // 12040: CUDA 12.4
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  // A driver runs what any later toolkit of its major version built; without one (0) no tensor can
  // be on a GPU.
  if (driver == 0 || driver / 1000 >= runtime / 1000) return nullptr;
  const auto version = [](int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  text = "the NVIDIA driver runs CUDA " + version(driver) +
         " and older, the kernels were built with " + version(runtime) +
         ": update the driver, or build them with an nvcc of CUDA " + std::to_string(driver / 1000);
  return text.c_str();
}

int current_device() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // otherwise the next launch would be blamed for it
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    const int device = current_device();
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
    throw CudaError("CUDA device " + std::to_string(device) + " has compute capability " +
                    std::to_string(major) + "." + std::to_string(minor) +
                    ", for which this library has no kernels: it was built for " + architectures() +
                    " (TORCH_CUDA_ARCH_LIST chooses)");
  }
  throw CudaError(std::string(what) + ": " + cudaGetErrorString(error));
}

void check_launched(const char* kernel) { check(cudaGetLastError(), kernel); }

unsigned blocks_for(int64_t work, int64_t per_block) {
  constexpr int64_t kMost = INT32_MAX;  // of a grid's first dimension
  const int64_t blocks = (work + per_block - 1) / per_block;
  if (blocks > kMost)
    throw CudaError("the call needs " + std::to_string(blocks) + " blocks, CUDA allows " +
                    std::to_string(kMost) + ": split its batch");
  return unsigned(blocks);
}

void forward(const rwkv6_context* context, int device, ForwardJob job) {
  const CurrentDevice current(device);
  const Launch launch = launch_on(context, device);
  if (job.sequences.count == 0 || job.H == 0) return;
  check_cu_seqlens(launch, job.sequences);
  const Family family =
      choose(job.sequences, job.k.dtype, job.N, {job.r, job.k, job.v, job.w, job.y});
  family == Family::chunked ? forward_chunked(launch, job) : forward_recurrent(launch, job);
}

void backward(const rwkv6_context* context, int device, BackwardJob job) {
  const CurrentDevice current(device);
  const Launch launch = launch_on(context, device);
  if (job.H == 0) return;
  const DType acc = state_dtype(job.r.dtype);
  const int64_t count = job.sequences.count, state_size = job.N * job.N;
  const States grad_initial_state = job.grad_initial;  // the kernels are given one per sequence
  // Without a gradient of y nothing depends on r and u, be they NaN: zeros take their place.
  if (!job.grad_y.data) job.r.data = job.u.data = nullptr;
  const bool wanted = grad_initial_state.data != nullptr;
  const bool one_to_one = job.sequences.states == count && !job.sequences.state_map.data &&
                          grad_initial_state.dtype == acc;
  if (wanted && !one_to_one) {
    job.grad_initial = {launch.workspace<char>(count * job.H * state_size * size_of(acc)), acc,
                        job.H * state_size, state_size, job.N};
  }
  if (count == 0) {  // nothing depends on u
    acc == DType::f64 ? sum_heads<double>(launch, nullptr, 0, 0, job.H, job.N, job.grad_u)
                      : sum_heads<float>(launch, nullptr, 0, 0, job.H, job.N, job.grad_u);
  } else {
    check_cu_seqlens(launch, job.sequences);
    const Family family = choose(
        job.sequences, job.r.dtype, job.N,
        {job.grad_y, job.r, job.k, job.v, job.w, job.grad_r, job.grad_k, job.grad_v, job.grad_w});
    family == Family::chunked ? backward_chunked(launch, job) : backward_recurrent(launch, job);
  }
  if (wanted && !one_to_one)
    acc == DType::f64 ? sum_states<double>(launch, job, grad_initial_state)
                      : sum_states<float>(launch, job, grad_initial_state);
}

}  // namespace rwkv6::cuda
