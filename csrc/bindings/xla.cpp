// WKV as custom calls of XLA's foreign function interface, for JAX and TensorFlow.
//
// Only XLA's header-only FFI is used. A handler runs where the runtime's API is at least as new as
// the headers it was built with; neither jaxlib, TensorFlow nor torch is linked, and CUDA is not
// needed to compile it: what the handlers of XLA's CUDA platform do lies in the kernel library.
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
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

// A buffer as a DLTensor, borrowed: on a GPU all of it, on the CPU batch rows [first, first +
// count). One row of u [B, H, N] is the library's u [H, N].
class View {
  static constexpr int kMaxDim = 4;
  DLTensor dl_ = {};
  int64_t shape_[kMaxDim] = {};

 public:
  View(const ffi::AnyBuffer& buffer, DLDevice gpu) {
    const auto dims = buffer.dimensions();
    for (size_t i = 0; i < dims.size() && i < kMaxDim; i++) shape_[i] = dims[i];
    dl_.data = buffer.untyped_data();
    dl_.device = gpu;
    dl_.ndim = int32_t(dims.size());
    dl_.dtype = dlpack_dtype(buffer.element_type());
    dl_.shape = shape_;
  }
  View(const ffi::AnyBuffer& buffer, int64_t first, int64_t count, bool drop_batch = false)
      : View(buffer, DLDevice{kDLCPU, 0}) {
    const int64_t rows = shape_[0];
    if (rows) dl_.data = static_cast<char*>(dl_.data) + int64_t(buffer.size_bytes()) / rows * first;
    shape_[0] = count;
    if (drop_batch) dl_.shape++, dl_.ndim--;
  }
  View(const View&) = delete;
  operator DLTensor*() { return &dl_; }
};

// XLA's own threads. The calling thread works too and waits only for work that another thread has
// begun: a pool without a free thread cannot block it.
void run_on_pool(void* pool, int64_t n, void (*body)(void*, int64_t, int64_t), void* data) {
  struct Work {
    int64_t n, shards;
    void (*body)(void*, int64_t, int64_t);
    void* data;
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;

    void run() {
      for (int64_t s; (s = next.fetch_add(1)) < shards;) {
        body(data, n * s / shards, n * (s + 1) / shards);
        if (done.fetch_add(1) + 1 < shards) continue;
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
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
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, [&] { return work->done == work->shards; });
}

rwkv6_context context_of(ffi::ThreadPool& threads) {
  rwkv6_context context = {};
  context.parallel_for = run_on_pool;
  context.pool = &threads;
  context.num_threads = int(threads.num_threads());
  return context;
}

ffi::Error error(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, message);
}

// The first of the optional operands at the end: the state each sequence starts from
// [B, H, N, N].
std::optional<ffi::AnyBuffer> state_of(const ffi::RemainingArgs& operands) {
  if (operands.size() == 0) return std::nullopt;
  return operands.get<ffi::AnyBuffer>(0).value();
}

// On the CPU the second one too: which of how many states that one was taken from [B], to be
// checked. (On a GPU that would wait for it; there the state taken for a wrong entry is NaN.)
struct Optional {
  std::optional<ffi::AnyBuffer> state;
  std::string problem;

  Optional(const ffi::RemainingArgs& operands, int64_t states) : state(state_of(operands)) {
    if (operands.size() < 2) return;
    const ffi::AnyBuffer state_map = operands.get<ffi::AnyBuffer>(1).value();
    const int32_t* rows = static_cast<const int32_t*>(state_map.untyped_data());
    for (size_t b = 0; b < state_map.element_count() && problem.empty(); b++)
      if (rows[b] < 0 || rows[b] >= states)
        problem = "state_map: entry " + std::to_string(b) + " is " + std::to_string(rows[b]) +
                  ", expected 0 to " + std::to_string(states - 1) + " (" + std::to_string(states) +
                  " rows of initial_state)";
  }
};

// The number of batch rows from `first` on that have the same u: as a rule all of them, since u
// [B, H, N] is one [H, N] broadcast; under vmap over u as many as belong to one u.
int64_t rows_with_one_u(const ffi::AnyBuffer& u, int64_t first) {
  const int64_t rows = u.dimensions()[0], bytes = rows ? int64_t(u.size_bytes()) / rows : 0;
  const char* data = static_cast<const char*>(u.untyped_data());
  int64_t next = first + 1;
  while (next < rows && !std::memcmp(data + first * bytes, data + next * bytes, size_t(bytes)))
    next++;
  return next - first;
}

bool is_batched(const ffi::AnyBuffer& r, const ffi::AnyBuffer& u) {
  return r.dimensions().size() == 4 && u.dimensions().size() == 3 &&
         r.dimensions()[0] == u.dimensions()[0];
}

ffi::Error forward(ffi::ThreadPool threads,
                   ffi::AnyBuffer r,             // [B, T, H, N]
                   ffi::AnyBuffer k,             // [B, T, H, N]
                   ffi::AnyBuffer v,             // [B, T, H, N]
                   ffi::AnyBuffer w,             // [B, T, H, N]
                   ffi::AnyBuffer u,             // [B, H, N]
                   ffi::RemainingArgs optional,  // state [B, H, N, N], state_map [B] (int32)
                   Result y,                     // [B, T, H, N]
                   Result final_state,           // [B, H, N, N], may be the memory of state
                   int64_t states) {
  const Optional given(optional, states);
  if (!given.problem.empty()) return error(given.problem);
  if (!is_batched(r, u)) return error("u: expected [B, H, N] beside r [B, T, H, N]");
  const rwkv6_context context = context_of(threads);
  const int64_t batch = r.dimensions()[0];
  for (int64_t b = 0, n; b < batch; b += n) {
    n = rows_with_one_u(u, b);
    View r_(r, b, n), k_(k, b, n), v_(v, b, n), w_(w, b, n), u_(u, b, 1, true), y_(*y, b, n);
    View final_(*final_state, b, n);
    std::optional<View> state;
    if (given.state) state.emplace(*given.state, b, n);
    const bool inplace = state && given.state->untyped_data() == final_state->untyped_data();
    const char* problem =
        inplace ? rwkv6_wkv_update(&context, r_, k_, v_, w_, u_, final_, nullptr, nullptr, y_)
                : rwkv6_wkv_forward(&context, r_, k_, v_, w_, u_,
                                    state ? static_cast<DLTensor*>(*state) : nullptr, nullptr,
                                    nullptr, y_, final_);
    if (problem) return error(problem);
  }
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool threads,
                    ffi::AnyBuffer grad_y,            // [B, T, H, N]
                    ffi::AnyBuffer grad_final_state,  // [B, H, N, N]
                    ffi::AnyBuffer r,                 // [B, T, H, N]
                    ffi::AnyBuffer k,                 // [B, T, H, N]
                    ffi::AnyBuffer v,                 // [B, T, H, N]
                    ffi::AnyBuffer w,                 // [B, T, H, N]
                    ffi::AnyBuffer u,                 // [B, H, N]
                    ffi::RemainingArgs optional,      // state [B, H, N, N], state_map [B] (int32)
                    Result grad_r,                    // [B, T, H, N]
                    Result grad_k,                    // [B, T, H, N]
                    Result grad_v,                    // [B, T, H, N]
                    Result grad_w,                    // [B, T, H, N]
                    Result grad_u,                    // [B, H, N], of each row by itself
                    ffi::RemainingRets grad_state,    // [B, H, N, N] beside state
                    int64_t states) {
  const Optional given(optional, states);
  if (!given.problem.empty()) return error(given.problem);
  if (!is_batched(r, u)) return error("u: expected [B, H, N] beside r [B, T, H, N]");
  std::optional<ffi::AnyBuffer> grad_state_buffer;
  if (given.state) grad_state_buffer = *grad_state.get<ffi::AnyBuffer>(0).value();

  const auto row = [&](const rwkv6_context* context, int64_t b) {
    View grad_y_(grad_y, b, 1), grad_final_(grad_final_state, b, 1);
    View r_(r, b, 1), k_(k, b, 1), v_(v, b, 1), w_(w, b, 1), u_(u, b, 1, true);
    View grad_r_(*grad_r, b, 1), grad_k_(*grad_k, b, 1), grad_v_(*grad_v, b, 1);
    View grad_w_(*grad_w, b, 1), grad_u_(*grad_u, b, 1, true);
    std::optional<View> state, grad_state_;
    if (given.state)
      state.emplace(*given.state, b, 1), grad_state_.emplace(*grad_state_buffer, b, 1);
    return rwkv6_wkv_backward(context, grad_y_, grad_final_, r_, k_, v_, w_, u_,
                              state ? static_cast<DLTensor*>(*state) : nullptr, nullptr, nullptr,
                              grad_r_, grad_k_, grad_v_, grad_w_, grad_u_,
                              state ? static_cast<DLTensor*>(*grad_state_) : nullptr);
  };
  const rwkv6_context context = context_of(threads);
  const int64_t batch = r.dimensions()[0];
  if (batch < 4 * context.num_threads) {  // rows one after the other, every thread on each
    for (int64_t b = 0; b < batch; b++)
      if (const char* problem = row(&context, b)) return error(problem);
    return ffi::Error::Success();
  }
  struct Rows {  // rows side by side, one thread on each
    const decltype(row)& call;
    std::mutex mutex;
    std::string problem;
  } rows{row, {}, {}};
  run_on_pool(
      &threads, batch,
      [](void* data, int64_t begin, int64_t end) {
        Rows& rows = *static_cast<Rows*>(data);
        for (int64_t b = begin; b < end; b++)
          if (const char* problem = rows.call(nullptr, b)) {
            std::lock_guard<std::mutex> lock(rows.mutex);
            rows.problem = problem;
          }
      },
      &rows);
  return rows.problem.empty() ? ffi::Error::Success() : error(rows.problem);
}

// What XLA lends to a call on a GPU. It makes the device's context current before it calls.
class Gpu {
  ffi::ScratchAllocator& scratch_;

  static void* allocate(void* pool, size_t bytes) {
    constexpr size_t kPromised = 16, kWanted = 256;  // alignments: XLA's, the kernels'
    auto& scratch = *static_cast<ffi::ScratchAllocator*>(pool);
    const std::optional<void*> memory = scratch.Allocate(bytes + kWanted - kPromised, kPromised);
    if (!memory || !*memory) return nullptr;
    const uintptr_t address = reinterpret_cast<uintptr_t>(*memory);
    return reinterpret_cast<void*>((address + kWanted - 1) / kWanted * kWanted);
  }

 public:
  rwkv6_context context = {};
  DLDevice device = {kDLCUDA, rwkv6_cuda_current_device()};

  Gpu(void* stream, ffi::ScratchAllocator& scratch) : scratch_(scratch) {
    context.pool = &scratch_;
    context.stream = stream;
    context.allocate = allocate;
  }
};

ffi::Error forward_cuda(void* stream, ffi::ScratchAllocator scratch,
                        ffi::AnyBuffer r,             // as in `forward`
                        ffi::AnyBuffer k,             //
                        ffi::AnyBuffer v,             //
                        ffi::AnyBuffer w,             //
                        ffi::AnyBuffer u,             // [B, H, N]
                        ffi::RemainingArgs optional,  // state, state_map
                        Result y,                     //
                        Result final_state,           // may be the memory of state
                        int64_t) {
  const Gpu gpu(stream, scratch);
  const std::optional<ffi::AnyBuffer> given = state_of(optional);
  View r_(r, gpu.device), k_(k, gpu.device), v_(v, gpu.device), w_(w, gpu.device);
  View u_(u, gpu.device), y_(*y, gpu.device), final_(*final_state, gpu.device);
  std::optional<View> state;
  if (given) state.emplace(*given, gpu.device);
  const bool inplace = given && given->untyped_data() == final_state->untyped_data();
  const char* problem =
      inplace ? rwkv6_wkv_update(&gpu.context, r_, k_, v_, w_, u_, final_, nullptr, nullptr, y_)
              : rwkv6_wkv_forward(&gpu.context, r_, k_, v_, w_, u_,
                                  state ? static_cast<DLTensor*>(*state) : nullptr, nullptr,
                                  nullptr, y_, final_);
  return problem ? error(problem) : ffi::Error::Success();
}

ffi::Error backward_cuda(void* stream, ffi::ScratchAllocator scratch,
                         ffi::AnyBuffer grad_y,            // as in `backward`
                         ffi::AnyBuffer grad_final_state,  //
                         ffi::AnyBuffer r,                 //
                         ffi::AnyBuffer k,                 //
                         ffi::AnyBuffer v,                 //
                         ffi::AnyBuffer w,                 //
                         ffi::AnyBuffer u,                 // [B, H, N]
                         ffi::RemainingArgs optional,      // state, state_map
                         Result grad_r,                    //
                         Result grad_k,                    //
                         Result grad_v,                    //
                         Result grad_w,                    //
                         Result grad_u,                    // [B, H, N], of each row by itself
                         ffi::RemainingRets grad_state,    // beside state
                         int64_t) {
  const Gpu gpu(stream, scratch);
  const std::optional<ffi::AnyBuffer> given = state_of(optional);
  View grad_y_(grad_y, gpu.device), grad_final_(grad_final_state, gpu.device);
  View r_(r, gpu.device), k_(k, gpu.device), v_(v, gpu.device), w_(w, gpu.device);
  View u_(u, gpu.device), grad_r_(*grad_r, gpu.device), grad_k_(*grad_k, gpu.device);
  View grad_v_(*grad_v, gpu.device), grad_w_(*grad_w, gpu.device), grad_u_(*grad_u, gpu.device);
  std::optional<View> state, grad_state_;
  if (given) {
    state.emplace(*given, gpu.device);
    grad_state_.emplace(*grad_state.get<ffi::AnyBuffer>(0).value(), gpu.device);
  }
  const char* problem = rwkv6_wkv_backward(
      &gpu.context, grad_y_, grad_final_, r_, k_, v_, w_, u_,
      state ? static_cast<DLTensor*>(*state) : nullptr, nullptr, nullptr, grad_r_, grad_k_, grad_v_,
      grad_w_, grad_u_, grad_state_ ? static_cast<DLTensor*>(*grad_state_) : nullptr);
  return problem ? error(problem) : ffi::Error::Success();
}

// The operands, results and attributes of forward and of backward, after the platform's context.
auto bind_forward(auto context) {
  return std::move(context)
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

auto bind_backward(auto context) {
  return std::move(context)
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

auto cpu() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

// Not marked as fit for XLA's command buffers (CUDA graphs): the scratch memory of a call is given
// back when the call returns, and a graph would use it again.
auto cuda() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Ctx<ffi::ScratchAllocator>();
}

}  // namespace

// Declared first, for the visibility: the macros below define them.
extern "C" RWKV6_API XLA_FFI_Error* rwkv6_xla_forward(XLA_FFI_CallFrame* frame);
extern "C" RWKV6_API XLA_FFI_Error* rwkv6_xla_backward(XLA_FFI_CallFrame* frame);
extern "C" RWKV6_API XLA_FFI_Error* rwkv6_xla_forward_cuda(XLA_FFI_CallFrame* frame);
extern "C" RWKV6_API XLA_FFI_Error* rwkv6_xla_backward_cuda(XLA_FFI_CallFrame* frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(rwkv6_xla_forward, forward, bind_forward(cpu()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rwkv6_xla_backward, backward, bind_backward(cpu()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rwkv6_xla_forward_cuda, forward_cuda, bind_forward(cuda()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(rwkv6_xla_backward_cuda, backward_cuda, bind_backward(cuda()));

// Registers those of the CPU with a runtime that has no Python interface for it (TensorFlow), whose
// API is `api`. Zero, or non-zero where the runtime is too old or refuses.
extern "C" RWKV6_API int rwkv6_xla_register(const XLA_FFI_Api* api) {
  if (!api || api->api_version.major_version != XLA_FFI_API_MAJOR ||
      api->api_version.minor_version < XLA_FFI_API_MINOR)
    return 1;
  return ffi::Ffi::RegisterStaticHandler(api, "rwkv6_xla_forward", "Host", rwkv6_xla_forward) ||
         ffi::Ffi::RegisterStaticHandler(api, "rwkv6_xla_backward", "Host", rwkv6_xla_backward);
}
