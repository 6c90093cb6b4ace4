// WKV as custom calls of XLA's foreign function interface, for JAX and TensorFlow.
//
// Only XLA's header-only FFI is used. A handler runs where the runtime's API is at least as new as
// the headers it was built with; neither jaxlib, TensorFlow nor torch is linked. Compiling it needs
// no CUDA, whose kernels are in the kernel library. Handlers of the CPU and of XLA's platform
// "CUDA" differ in what XLA lends to a call: class Cpu and class Gpu.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "rwkv6.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Result = ffi::Result<ffi::AnyBuffer>;

DLDataType dlpack_dtype(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F64: return {kDLFloat, 64, 1};
    case ffi::DataType::F32: return {kDLFloat, 32, 1};
    case ffi::DataType::BF16: return {kDLBfloat, 16, 1};
    case ffi::DataType::F16: return {kDLFloat, 16, 1};
    case ffi::DataType::S32: return {kDLInt, 32, 1};
    case ffi::DataType::S64: return {kDLInt, 64, 1};
    default: return {kDLOpaqueHandle, 0, 1};  // the library refuses it by the argument's name
  }
}

// A buffer as a DLTensor, borrowed; NULL for an absent one.
class View {
  DLTensor dl_ = {};
  bool present_ = false;

 public:
  View(const std::optional<ffi::AnyBuffer>& buffer, DLDevice device) {
    if (!buffer) return;
    present_ = true;
    const auto dims = buffer->dimensions();
    dl_.data = buffer->untyped_data();
    dl_.device = device;
    dl_.ndim = int32_t(dims.size());
    dl_.dtype = dlpack_dtype(buffer->element_type());
    dl_.shape = const_cast<int64_t*>(dims.begin());
  }
  operator DLTensor*() { return present_ ? &dl_ : nullptr; }
};

// Runs body on XLA's thread pool. The calling thread takes shards too, and waits only for shards
// that another thread has begun, so that a pool without a free thread cannot block it.
void run_on_pool(void* pool, int64_t n, void (*body)(void*, int64_t, int64_t), void* data) {
  struct Work {
    int64_t n, shards;
    void (*body)(void*, int64_t, int64_t);
    void* data;
    std::atomic<int64_t> next{0};
    std::atomic<int> done{0};  // an int is what Linux can wait for

    void run() {
      for (int64_t s; (s = next.fetch_add(1)) < shards;) {
        body(data, n * s / shards, n * (s + 1) / shards);
        if (done.fetch_add(1) + 1 == shards) done.notify_one();
      }
    }
  };
  ffi::ThreadPool* threads = static_cast<ffi::ThreadPool*>(pool);
  const int64_t workers = std::min<int64_t>(n, threads->num_threads());
  if (workers <= 1) return body(data, 0, n);
  auto work = std::make_shared<Work>();
  work->n = n, work->shards = std::min(n, 4 * workers), work->body = body, work->data = data;
  for (int64_t i = 1; i < workers; i++) threads->Schedule([work] { work->run(); });
  work->run();
  for (int done; (done = work->done) < work->shards;) work->done.wait(done);
}

// What XLA lends to a call on the CPU.
class Cpu {
  ffi::ThreadPool threads_;

 public:
  DLDevice device = {kDLCPU, 0};

  explicit Cpu(ffi::ThreadPool threads) : threads_(std::move(threads)) {}

  rwkv6_context context() {
    rwkv6_context context = {};
    context.parallel_for = run_on_pool;
    context.pool = &threads_;
    context.num_threads = int(threads_.num_threads());
    return context;
  }

  // What is wrong with the entries of state_map, which choose among so many states.
  std::string problem_of(const std::optional<ffi::AnyBuffer>& state_map, int64_t states) const {
    if (!state_map) return "";
    const int32_t* rows = static_cast<const int32_t*>(state_map->untyped_data());
    for (size_t b = 0; b < state_map->element_count(); b++)
      if (rows[b] < 0 || rows[b] >= states)
        return "state_map: entry " + std::to_string(b) + " is " + std::to_string(rows[b]) +
               ", expected 0 to " + std::to_string(states - 1) + " (" + std::to_string(states) +
               " rows of initial_state)";
    return "";
  }
};

// What XLA lends to a call on a GPU. It makes the device's context current before it calls.
class Gpu {
  void* stream_;
  ffi::ScratchAllocator scratch_;

  static void* allocate(void* pool, size_t bytes) {
    constexpr size_t kPromised = 16, kWanted = 256;  // alignments: XLA's, the kernels'
    auto& scratch = *static_cast<ffi::ScratchAllocator*>(pool);
    const std::optional<void*> memory = scratch.Allocate(bytes + kWanted - kPromised, kPromised);
    if (!memory || !*memory) return nullptr;
    const uintptr_t address = reinterpret_cast<uintptr_t>(*memory);
    return reinterpret_cast<void*>((address + kWanted - 1) / kWanted * kWanted);
  }

 public:
  DLDevice device = {kDLCUDA, rwkv6_cuda_current_device()};

  Gpu(void* stream, ffi::ScratchAllocator scratch)
      : stream_(stream), scratch_(std::move(scratch)) {}

  rwkv6_context context() {
    rwkv6_context context = {};
    context.pool = &scratch_;
    context.stream = stream_;
    context.allocate = allocate;
    return context;
  }

  // Reading them would wait for the GPU; the state that XLA takes for a wrong entry is NaN.
  std::string problem_of(const std::optional<ffi::AnyBuffer>&, int64_t) const { return ""; }
};

ffi::Error result_of(const char* problem) {
  if (!problem) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, problem);
}

// One of the optional buffers at the end. Of the operands, the first is the state that each
// sequence starts from [B, H, N, N], and the second says which of the initial states that was [B].
std::optional<ffi::AnyBuffer> optional(const ffi::RemainingArgs& operands, size_t i) {
  if (operands.size() <= i) return std::nullopt;
  return operands.get<ffi::AnyBuffer>(i).value();
}
std::optional<ffi::AnyBuffer> optional(const ffi::RemainingRets& results, size_t i) {
  if (results.size() <= i) return std::nullopt;
  return *results.get<ffi::AnyBuffer>(i).value();
}

template <class Platform>
ffi::Error forward(Platform platform,
                   ffi::AnyBuffer r,         // [B, T, H, N]
                   ffi::AnyBuffer k,         // [B, T, H, N]
                   ffi::AnyBuffer v,         // [B, T, H, N]
                   ffi::AnyBuffer w,         // [B, T, H, N]
                   ffi::AnyBuffer u,         // [B, H, N]
                   ffi::RemainingArgs more,  // state [B, H, N, N], state_map [B] (int32)
                   Result y,                 // [B, T, H, N]
                   Result final_state,       // [B, H, N, N], may be the memory of state
                   int64_t states) {
  const std::string problem = platform.problem_of(optional(more, 1), states);
  if (!problem.empty()) return result_of(problem.c_str());
  const auto view = [&](const auto& buffer) { return View(buffer, platform.device); };
  const std::optional<ffi::AnyBuffer> state = optional(more, 0);
  const bool in_place = state && state->untyped_data() == final_state->untyped_data();
  View r_ = view(r), k_ = view(k), v_ = view(v), w_ = view(w), u_ = view(u);
  View state_ = view(state), y_ = view(*y), final_state_ = view(*final_state);
  rwkv6_wkv_inputs inputs = {};
  inputs.r = r_, inputs.k = k_, inputs.v = v_, inputs.w = w_, inputs.u = u_;
  const rwkv6_context context = platform.context();
  if (in_place) return result_of(rwkv6_wkv_update(&context, &inputs, final_state_, y_));
  inputs.initial_state = state_;
  return result_of(rwkv6_wkv_forward(&context, &inputs, y_, final_state_, nullptr));
}

template <class Platform>
ffi::Error backward(Platform platform,
                    ffi::AnyBuffer grad_y,            // [B, T, H, N]
                    ffi::AnyBuffer grad_final_state,  // [B, H, N, N]
                    ffi::AnyBuffer r,                 // [B, T, H, N]
                    ffi::AnyBuffer k,                 // [B, T, H, N]
                    ffi::AnyBuffer v,                 // [B, T, H, N]
                    ffi::AnyBuffer w,                 // [B, T, H, N]
                    ffi::AnyBuffer u,                 // [B, H, N]
                    ffi::RemainingArgs more,          // state [B, H, N, N], state_map [B] (int32)
                    Result grad_r,                    // [B, T, H, N]
                    Result grad_k,                    // [B, T, H, N]
                    Result grad_v,                    // [B, T, H, N]
                    Result grad_w,                    // [B, T, H, N]
                    Result grad_u,                    // [B, H, N], of each batch row by itself
                    ffi::RemainingRets more_grads,    // [B, H, N, N], if there is a state
                    int64_t states) {
  const std::string problem = platform.problem_of(optional(more, 1), states);
  if (!problem.empty()) return result_of(problem.c_str());
  const auto view = [&](const auto& buffer) { return View(buffer, platform.device); };
  View r_ = view(r), k_ = view(k), v_ = view(v), w_ = view(w), u_ = view(u);
  View state_ = view(optional(more, 0)), grad_state_ = view(optional(more_grads, 0));
  View grad_y_ = view(grad_y), grad_final_state_ = view(grad_final_state);
  View grad_r_ = view(*grad_r), grad_k_ = view(*grad_k), grad_v_ = view(*grad_v);
  View grad_w_ = view(*grad_w), grad_u_ = view(*grad_u);
  rwkv6_wkv_inputs inputs = {};
  inputs.r = r_, inputs.k = k_, inputs.v = v_, inputs.w = w_, inputs.u = u_;
  inputs.initial_state = state_;
  const rwkv6_wkv_gradients gradients = {grad_r_, grad_k_, grad_v_, grad_w_, grad_u_, grad_state_};
  const rwkv6_context context = platform.context();
  return result_of(
      rwkv6_wkv_backward(&context, &inputs, nullptr, grad_y_, grad_final_state_, &gradients));
}

}  // namespace

// A platform's context, made of XLA's own.
template <>
struct xla::ffi::CtxDecoding<Cpu> {
  using Type = Cpu;
  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& diagnostic) {
    return Cpu(*CtxDecoding<ThreadPool>::Decode(api, context, diagnostic));
  }
};
template <>
struct xla::ffi::CtxDecoding<Gpu> {
  using Type = Gpu;
  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& diagnostic) {
    const auto stream = CtxDecoding<PlatformStream<void*>>::Decode(api, context, diagnostic);
    if (!stream) return std::nullopt;
    return Gpu(*stream, *CtxDecoding<ScratchAllocator>::Decode(api, context, diagnostic));
  }
};

namespace {

// The operands, results and attributes of forward and of backward, after the platform. None is
// marked as fit for XLA's command buffers (CUDA graphs): the scratch memory of a call is given back
// when the call returns, and a graph would use it again.
template <class Platform>
auto bind_forward() {
  return ffi::Ffi::Bind()
      .template Ctx<Platform>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Attr<int64_t>("states");
}

template <class Platform>
auto bind_backward() {
  return ffi::Ffi::Bind()
      .template Ctx<Platform>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .RemainingRets()
      .template Attr<int64_t>("states");
}

}  // namespace

// Declared first, for the visibility: the macros below define them.
extern "C" RWKV6_API XLA_FFI_Error* rwkv6_xla_forward(XLA_FFI_CallFrame* frame);
extern "C" RWKV6_API XLA_FFI_Error* rwkv6_xla_backward(XLA_FFI_CallFrame* frame);
extern "C" RWKV6_API XLA_FFI_Error* rwkv6_xla_forward_cuda(XLA_FFI_CallFrame* frame);
extern "C" RWKV6_API XLA_FFI_Error* rwkv6_xla_backward_cuda(XLA_FFI_CallFrame* frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(rwkv6_xla_forward, forward<Cpu>, bind_forward<Cpu>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(rwkv6_xla_backward, backward<Cpu>, bind_backward<Cpu>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(rwkv6_xla_forward_cuda, forward<Gpu>, bind_forward<Gpu>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(rwkv6_xla_backward_cuda, backward<Gpu>, bind_backward<Gpu>());

// Registers the CPU's handlers with a runtime that has no Python interface for that (TensorFlow);
// `api` is its API. Returns zero, or non-zero where the runtime is too old or refuses.
extern "C" RWKV6_API int rwkv6_xla_register(const XLA_FFI_Api* api) {
  if (!api || api->api_version.major_version != XLA_FFI_API_MAJOR ||
      api->api_version.minor_version < XLA_FFI_API_MINOR)
    return 1;
  return ffi::Ffi::RegisterStaticHandler(api, "rwkv6_xla_forward", "Host", rwkv6_xla_forward) ||
         ffi::Ffi::RegisterStaticHandler(api, "rwkv6_xla_backward", "Host", rwkv6_xla_backward);
}
