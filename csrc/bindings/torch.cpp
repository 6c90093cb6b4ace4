// The operators of namespace rwkv6, for torch's dispatcher, over the kernel library.
//
// Only LibTorch's stable ABI is used: one binary serves every torch from 2.10 on.
#include "rwkv6.h"

#include <dlfcn.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "huge_pages.h"

// After rwkv6.h, because torch's copy of dlpack.h refuses to be included in stable-ABI code.
#define TORCH_TARGET_VERSION 0x020a000000000000
#define TORCH_STABLE_ONLY
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

DLDataType dlpack_dtype(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return {kDLFloat, 64, 1};
    case ScalarType::Float: return {kDLFloat, 32, 1};
    case ScalarType::BFloat16: return {kDLBfloat, 16, 1};
    case ScalarType::Half: return {kDLFloat, 16, 1};
    case ScalarType::Char: return {kDLInt, 8, 1};
    case ScalarType::Int: return {kDLInt, 32, 1};
    case ScalarType::Long: return {kDLInt, 64, 1};
    default: return {kDLOpaqueHandle, 0, 1};  // the library refuses it by the argument's name
  }
}

DLDevice dlpack_device(const Tensor& x) {
  if (x.is_cpu()) return {kDLCPU, 0};
  if (x.is_cuda()) return {kDLCUDA, x.get_device_index()};
  return {kDLExtDev, 0};  // the library refuses it by the argument's name
}

// A tensor's memory as a DLTensor, borrowed.
class View {
  Tensor tensor_;  // keeps sizes, strides and memory alive
  DLTensor dl_ = {};
  bool present_ = false;

  void describe(void* data) {
    present_ = true;
    dl_.data = data;
    dl_.device = dlpack_device(tensor_);
    dl_.ndim = int32_t(tensor_.dim());
    dl_.dtype = dlpack_dtype(tensor_);
    dl_.shape = const_cast<int64_t*>(tensor_.sizes().data());
    dl_.strides = const_cast<int64_t*>(tensor_.strides().data());
  }

 public:
  // An input: only one whose last dimension is not contiguous is copied.
  explicit View(const Tensor& x) : tensor_(x) {
    const int64_t last = x.dim() - 1;
    if (last >= 0 && x.size(last) > 1 && x.stride(last) != 1)
      tensor_ = torch::stable::contiguous(x);
    describe(const_cast<void*>(tensor_.const_data_ptr()));
  }
  explicit View(const OptionalTensor& x) : View() {
    if (x) *this = View(*x);
  }
  View() : tensor_(AtenTensorHandle(nullptr)) {}

  static View output(const Tensor& x) {
    View view;
    view.tensor_ = x;
    view.describe(x.mutable_data_ptr());
    return view;
  }

  operator DLTensor*() { return present_ ? &dl_ : nullptr; }
};

// u [H, N]. The library takes [B, H, N] as well, which is for XLA.
View heads(const Tensor& u) {
  if (u.dim() == 3) throw std::runtime_error("u: expected 2 dimensions [H, N], got 3");
  return View(u);
}

// The inputs of WKV, borrowed for the expression that this is part of. An update has no initial
// state.
class WkvInputs {
  View r_, k_, v_, w_, u_, initial_state_, state_map_, cu_seqlens_;
  rwkv6_wkv_inputs inputs_;

 public:
  WkvInputs(const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
            const OptionalTensor& initial_state, const OptionalTensor& state_map,
            const OptionalTensor& cu_seqlens)
      : r_(r),
        k_(k),
        v_(v),
        w_(w),
        u_(heads(u)),
        initial_state_(initial_state),
        state_map_(state_map),
        cu_seqlens_(cu_seqlens),
        inputs_{r_, k_, v_, w_, u_, initial_state_, state_map_, cu_seqlens_} {}
  // Without r and u, for the final state alone.
  WkvInputs(const Tensor& k, const Tensor& v, const Tensor& w, const OptionalTensor& initial_state,
            const OptionalTensor& state_map, const OptionalTensor& cu_seqlens)
      : k_(k),
        v_(v),
        w_(w),
        initial_state_(initial_state),
        state_map_(state_map),
        cu_seqlens_(cu_seqlens),
        inputs_{nullptr, k_, v_, w_, nullptr, initial_state_, state_map_, cu_seqlens_} {}
  WkvInputs(const WkvInputs&) = delete;
  operator const rwkv6_wkv_inputs*() const { return &inputs_; }
};

// The same of RWKV-4's operator.
class Wkv4Inputs {
  View k_, v_, w_, u_, initial_state_;
  rwkv6_wkv4_inputs inputs_;

 public:
  Wkv4Inputs(const Tensor& k, const Tensor& v, const Tensor& w, const Tensor& u,
             const OptionalTensor& initial_state)
      : k_(k),
        v_(v),
        w_(w),
        u_(u),
        initial_state_(initial_state),
        inputs_{k_, v_, w_, u_, initial_state_} {}
  Wkv4Inputs(const Wkv4Inputs&) = delete;
  operator const rwkv6_wkv4_inputs*() const { return &inputs_; }
};

int32_t dtype_of(const Tensor& x) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

// A new contiguous tensor on the device of `beside`. It calls what torch::stable::empty calls in
// the end, without going through the dispatcher.
Tensor empty(const Tensor& beside, std::initializer_list<int64_t> sizes, int32_t dtype) {
  constexpr size_t kMaxDim = 4;
  int64_t strides[kMaxDim] = {}, step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= sizes.begin()[i]) strides[i] = step;
  const bool cuda = beside.is_cuda();
  const int32_t device = cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, dtype, device,
                               cuda ? beside.get_device_index() : 0,
                               &handle) != AOTI_TORCH_SUCCESS) {
    std::string text = "rwkv6: out of memory for an output of shape [";
    for (size_t i = 0; i < sizes.size(); i++)
      text += (i ? ", " : "") + std::to_string(sizes.begin()[i]);
    throw std::runtime_error(text + "]");
  }
  const Tensor x(handle);
  if (!cuda) rwkv6::want_huge_pages(x.mutable_data_ptr(), size_t(x.numel()) * x.element_size());
  return x;
}

// An output of the shape and dtype of x; empty if the shape is one that the library refuses.
Tensor empty_for(const Tensor& x) {
  const auto n = x.sizes();
  switch (n.size()) {
    case 1: return empty(x, {n[0]}, dtype_of(x));
    case 2: return empty(x, {n[0], n[1]}, dtype_of(x));
    case 3: return empty(x, {n[0], n[1], n[2]}, dtype_of(x));
    case 4: return empty(x, {n[0], n[1], n[2], n[3]}, dtype_of(x));
    default: return empty(x, {0}, dtype_of(x));
  }
}

int32_t state_dtype(const Tensor& inputs) {
  return inputs.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64()
                                                    : aoti_torch_dtype_float32();
}

// [B or M, H, N, N]
Tensor empty_states(const Tensor& r, const OptionalTensor& cu_seqlens) {
  const auto n = r.sizes();
  if (n.size() != 4 || n[3] > RWKV6_MAX_HEAD_SIZE)  // the library is going to refuse r
    return empty(r, {0}, aoti_torch_dtype_float32());
  int64_t sequences = n[0];
  if (cu_seqlens) sequences = cu_seqlens->numel() ? cu_seqlens->numel() - 1 : 0;
  return empty(r, {sequences, n[2], n[3], n[3]}, state_dtype(r));
}

// [B P + 2, H, N, N]: torch.compile treats tensors of 0 rows or 1 apart from all others, and would
// compile again where so few become more.
Tensor empty_checkpoints(const Tensor& r) {
  const auto n = r.sizes();
  if (n.size() != 4 || n[3] > RWKV6_MAX_HEAD_SIZE)  // the library is going to refuse r
    return empty(r, {0}, aoti_torch_dtype_float32());
  const int64_t rows = n[0] * (n[1] / RWKV6_CHECKPOINT_TOKENS) + 2;
  return empty(r, {rows, n[2], n[3], n[3]}, state_dtype(r));
}

// [B, 3, D]
Tensor empty_channel_states(const Tensor& k) {
  const auto n = k.sizes();
  if (n.size() != 3) return empty(k, {0}, state_dtype(k));  // the library is going to refuse k
  return empty(k, {n[0], 3, n[2]}, state_dtype(k));
}

// aoti_torch_get_current_cuda_stream of the torch in this process; nullptr if that is not a CUDA
// build. It is looked up at run time, not linked, so that one binary serves CPU builds as well.
using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);
CurrentStream current_stream() {
  static const CurrentStream function = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  return function;
}

// What torch lends to a call: its thread pool, or on a GPU its current stream and memory of its
// allocator. That memory goes back when the call returns, before the kernels are done: the
// allocator hands it out again only to what the same stream runs after them. For the same reason,
// and because nothing waits for the GPU or calls cudaMalloc, calls can be captured in a CUDA graph
// and run on side streams. Meanwhile the tensors' GPU is torch's current one: torch goes back to the
// one before without giving it a CUDA context that it had no use for so far.
class Context {
  const Tensor& r_;  // or k: a tensor on the call's device
  std::optional<torch::stable::accelerator::DeviceGuard> device_;
  std::vector<Tensor> workspace_;
  rwkv6_context context_ = {};

  static void parallel_for(void*, int64_t n, void (*body)(void*, int64_t, int64_t), void* data) {
    torch::stable::parallel_for(0, n, 1,
                                [=](int64_t begin, int64_t end) { body(data, begin, end); });
  }

  static void* allocate(void* pool, size_t bytes) {
    Context* self = static_cast<Context*>(pool);
    try {
      self->workspace_.push_back(empty(self->r_, {int64_t(bytes)}, aoti_torch_dtype_uint8()));
    } catch (const std::exception&) {  // must not cross the C interface
      return nullptr;
    }
    return self->workspace_.back().mutable_data_ptr();
  }

 public:
  explicit Context(const Tensor& r) : r_(r) {
    context_.pool = this;
    if (r.is_cuda()) {
      context_.allocate = &allocate;
      device_.emplace(r.get_device_index());
      STABLE_TORCH_ERROR_CODE_CHECK(current_stream()(r.get_device_index(), &context_.stream));
    } else {
      context_.parallel_for = &parallel_for;
      context_.num_threads = int(torch::stable::get_num_threads());
    }
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  operator const rwkv6_context*() const { return &context_; }
};

void check(const char* message) {
  if (message) throw std::runtime_error(message);
}

// The address of a temporary, for the expression that it is part of.
template <class T>
const T* address(const T& x) {
  return &x;
}

std::tuple<Tensor, Tensor> wkv(const Tensor& r,                      // [B, T, H, N]
                               const Tensor& k,                      // [B, T, H, N]
                               const Tensor& v,                      // [B, T, H, N]
                               const Tensor& w,                      // [B, T, H, N]
                               const Tensor& u,                      // [H, N]
                               const OptionalTensor& initial_state,  // [S, H, N, N]
                               const OptionalTensor& state_map,      // [B] or [M]
                               const OptionalTensor& cu_seqlens) {   // [M + 1]
  const Tensor y = empty_for(r), final_state = empty_states(r, cu_seqlens);
  check(rwkv6_wkv_forward(Context(r),
                          WkvInputs(r, k, v, w, u, initial_state, state_map, cu_seqlens),
                          View::output(y), View::output(final_state), nullptr));
  return {y, final_state};
}

// The final state of wkv alone.
Tensor wkv_final_state(const Tensor& k,                      // [B, T, H, N]
                       const Tensor& v,                      // [B, T, H, N]
                       const Tensor& w,                      // [B, T, H, N]
                       const OptionalTensor& initial_state,  // [S, H, N, N]
                       const OptionalTensor& state_map,      // [B] or [M]
                       const OptionalTensor& cu_seqlens) {   // [M + 1]
  const Tensor final_state = empty_states(k, cu_seqlens);
  check(rwkv6_wkv_forward(Context(k), WkvInputs(k, v, w, initial_state, state_map, cu_seqlens),
                          nullptr, View::output(final_state), nullptr));
  return final_state;
}

// wkv for autograd, which keeps what wkv_checkpointed_backward needs.
std::tuple<Tensor, Tensor, Tensor> wkv_checkpointed(
    const Tensor& r,                      // [B, T, H, N]
    const Tensor& k,                      // [B, T, H, N]
    const Tensor& v,                      // [B, T, H, N]
    const Tensor& w,                      // [B, T, H, N]
    const Tensor& u,                      // [H, N]
    const OptionalTensor& initial_state,  // [S, H, N, N]
    const OptionalTensor& state_map,      // [B] or [M]
    const OptionalTensor& cu_seqlens) {   // [M + 1]
  const Tensor y = empty_for(r), final_state = empty_states(r, cu_seqlens),
               checkpoints = empty_checkpoints(r);
  check(rwkv6_wkv_forward(Context(r),
                          WkvInputs(r, k, v, w, u, initial_state, state_map, cu_seqlens),
                          View::output(y), View::output(final_state), View::output(checkpoints)));
  return {y, final_state, checkpoints};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients wkv_checkpointed_backward(const OptionalTensor& grad_y,            // [B, T, H, N]
                                    const OptionalTensor& grad_final_state,  // [B or M, H, N, N]
                                    const OptionalTensor& checkpoints,       // [B P + 2, H, N, N]
                                    const Tensor& r,                         // [B, T, H, N]
                                    const Tensor& k,                         // [B, T, H, N]
                                    const Tensor& v,                         // [B, T, H, N]
                                    const Tensor& w,                         // [B, T, H, N]
                                    const Tensor& u,                         // [H, N]
                                    const OptionalTensor& initial_state,     // [S, H, N, N]
                                    const OptionalTensor& state_map,         // [B] or [M]
                                    const OptionalTensor& cu_seqlens) {      // [M + 1]
  const Tensor grad_r = empty_for(r), grad_k = empty_for(k), grad_v = empty_for(v),
               grad_w = empty_for(w), grad_u = empty_for(u);
  const Tensor grad_initial =
      initial_state ? empty_for(*initial_state) : empty(r, {0}, aoti_torch_dtype_float32());
  check(rwkv6_wkv_backward(
      Context(r), WkvInputs(r, k, v, w, u, initial_state, state_map, cu_seqlens), View(checkpoints),
      View(grad_y), View(grad_final_state),
      address(rwkv6_wkv_gradients{
          .grad_r = View::output(grad_r),
          .grad_k = View::output(grad_k),
          .grad_v = View::output(grad_v),
          .grad_w = View::output(grad_w),
          .grad_u = View::output(grad_u),
          .grad_initial_state = initial_state ? View::output(grad_initial) : View()})));
  return {grad_r, grad_k, grad_v, grad_w, grad_u, grad_initial};
}

Gradients wkv_backward(const OptionalTensor& grad_y,            // [B, T, H, N]
                       const OptionalTensor& grad_final_state,  // [B or M, H, N, N]
                       const Tensor& r,                         // [B, T, H, N]
                       const Tensor& k,                         // [B, T, H, N]
                       const Tensor& v,                         // [B, T, H, N]
                       const Tensor& w,                         // [B, T, H, N]
                       const Tensor& u,                         // [H, N]
                       const OptionalTensor& initial_state,     // [S, H, N, N]
                       const OptionalTensor& state_map,         // [B] or [M]
                       const OptionalTensor& cu_seqlens) {      // [M + 1]
  return wkv_checkpointed_backward(grad_y, grad_final_state, std::nullopt, r, k, v, w, u,
                                   initial_state, state_map, cu_seqlens);
}

Tensor wkv_update(const Tensor& r,                     // [B, T, H, N]
                  const Tensor& k,                     // [B, T, H, N]
                  const Tensor& v,                     // [B, T, H, N]
                  const Tensor& w,                     // [B, T, H, N]
                  const Tensor& u,                     // [H, N]
                  const Tensor& state,                 // [S, H, N, N], updated in place
                  const OptionalTensor& state_map,     // [B] or [M]
                  const OptionalTensor& cu_seqlens) {  // [M + 1]
  const Tensor y = empty_for(r);
  check(rwkv6_wkv_update(Context(r), WkvInputs(r, k, v, w, u, std::nullopt, state_map, cu_seqlens),
                         View::output(state), View::output(y)));
  return y;
}

std::tuple<Tensor, Tensor> wkv4(const Tensor& k,                        // [B, T, D]
                                const Tensor& v,                        // [B, T, D]
                                const Tensor& w,                        // [D]
                                const Tensor& u,                        // [D]
                                const OptionalTensor& initial_state) {  // [B, 3, D]
  const Tensor y = empty_for(k), final_state = empty_channel_states(k);
  check(rwkv6_wkv4_forward(Context(k), Wkv4Inputs(k, v, w, u, initial_state), View::output(y),
                           View::output(final_state)));
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> wkv4_backward(
    const OptionalTensor& grad_y,            // [B, T, D]
    const OptionalTensor& grad_final_state,  // [B, 3, D]
    const Tensor& k,                         // [B, T, D]
    const Tensor& v,                         // [B, T, D]
    const Tensor& w,                         // [D]
    const Tensor& u,                         // [D]
    const OptionalTensor& initial_state) {   // [B, 3, D]
  const Tensor grad_k = empty_for(k), grad_v = empty_for(v), grad_w = empty_for(w),
               grad_u = empty_for(u);
  const Tensor grad_initial =
      initial_state ? empty_for(*initial_state) : empty(k, {0}, aoti_torch_dtype_float32());
  check(rwkv6_wkv4_backward(
      Context(k), Wkv4Inputs(k, v, w, u, initial_state), View(grad_y), View(grad_final_state),
      address(rwkv6_wkv4_gradients{
          .grad_k = View::output(grad_k),
          .grad_v = View::output(grad_v),
          .grad_w = View::output(grad_w),
          .grad_u = View::output(grad_u),
          .grad_initial_state = initial_state ? View::output(grad_initial) : View()})));
  return {grad_k, grad_v, grad_w, grad_u, grad_initial};
}

Tensor wkv4_update(const Tensor& k,        // [B, T, D]
                   const Tensor& v,        // [B, T, D]
                   const Tensor& w,        // [D]
                   const Tensor& u,        // [D]
                   const Tensor& state) {  // [B, 3, D], updated in place
  const Tensor y = empty_for(k);
  check(rwkv6_wkv4_update(Context(k), Wkv4Inputs(k, v, w, u, std::nullopt), View::output(state),
                          View::output(y)));
  return y;
}

Tensor matvec(const Tensor& x,                              // [M, K]
              const Tensor& weight) {                       // [N, K]
  const bool matrices = x.dim() == 2 && weight.dim() == 2;  // otherwise it is going to be refused
  const Tensor y = matrices ? empty(x, {x.size(0), weight.size(0)}, dtype_of(x)) : empty_for(x);
  check(rwkv6_matvec(Context(x), View(x), View(weight), View::output(y)));
  return y;
}

Tensor matvec_int8(const Tensor& x,                         // [M, K]
                   const Tensor& weight,                    // [N, K], int8
                   const Tensor& scale) {                   // [N]
  const bool matrices = x.dim() == 2 && weight.dim() == 2;  // otherwise it is going to be refused
  const Tensor y = matrices ? empty(x, {x.size(0), weight.size(0)}, dtype_of(x)) : empty_for(x);
  check(rwkv6_matvec_int8(Context(x), View(x), View(weight), View(scale), View::output(y)));
  return y;
}

Tensor decode_layer(const Tensor& x,          // [B, D]
                    const Tensor& att_shift,  // [B, D], updated in place
                    const Tensor& wkv,        // [B, H, N, N], updated in place
                    const Tensor& ffn_shift,  // [B, D], updated in place
                    const std::vector<Tensor>& parameters,
                    const std::vector<Tensor>& scales,  // of the matrices, where those are int8
                    double ln_eps, double ln_x_eps) {
  rwkv6_layer layer = {};
  const DLTensor** const parameter_fields[] = {
#define RWKV6_LAYER_PARAMETER(field, name, ...) &layer.field,
#include "rwkv6_layer_parameters.inc"
  };
  const DLTensor** const scale_fields[] = {
#define RWKV6_LAYER_PARAMETER(field, name, ...)
#define RWKV6_LAYER_MATRIX(field, name, rows, columns) &layer.field##_scale,
#include "rwkv6_layer_parameters.inc"
  };
  std::vector<View> parameter_views(parameters.begin(), parameters.end());
  std::vector<View> scale_views(scales.begin(), scales.end());
  const auto assign = [](const char* what, const auto& fields, std::vector<View>& views) {
    if (views.size() != std::size(fields))
      throw std::runtime_error("rwkv6::decode_layer: expected " +
                               std::to_string(std::size(fields)) + " " + what + ", got " +
                               std::to_string(views.size()));
    for (size_t i = 0; i < views.size(); i++) *fields[i] = views[i];
  };
  assign("parameters", parameter_fields, parameter_views);
  if (!scales.empty()) assign("scales", scale_fields, scale_views);
  layer.ln_eps = ln_eps, layer.ln_x_eps = ln_x_eps;
  const Tensor y = empty_for(x);
  check(rwkv6_decode_layer(Context(x), &layer, View(x), View::output(att_shift), View::output(wkv),
                           View::output(ffn_shift), View::output(y)));
  return y;
}

}  // namespace

// torch_rwkv6/contract.py holds the same schemas, for an installation without binary.
STABLE_TORCH_LIBRARY(rwkv6, m) {
  m.def(
      "wkv(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? initial_state=None, "
      "Tensor? state_map=None, Tensor? cu_seqlens=None) -> (Tensor y, Tensor final_state)");
  m.def(
      "wkv_final_state(Tensor k, Tensor v, Tensor w, Tensor? initial_state=None, "
      "Tensor? state_map=None, Tensor? cu_seqlens=None) -> Tensor");
  m.def(
      "wkv_backward(Tensor? grad_y, Tensor? grad_final_state, Tensor r, Tensor k, Tensor v, "
      "Tensor w, Tensor u, Tensor? initial_state, Tensor? state_map, Tensor? cu_seqlens) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "wkv_checkpointed(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, "
      "Tensor? initial_state=None, Tensor? state_map=None, Tensor? cu_seqlens=None) -> "
      "(Tensor y, Tensor final_state, Tensor checkpoints)");
  m.def(
      "wkv_checkpointed_backward(Tensor? grad_y, Tensor? grad_final_state, Tensor? checkpoints, "
      "Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor? initial_state, "
      "Tensor? state_map, Tensor? cu_seqlens) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "wkv_update(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor(a!) state, "
      "Tensor? state_map=None, Tensor? cu_seqlens=None) -> Tensor");
  m.def(
      "wkv4(Tensor k, Tensor v, Tensor w, Tensor u, Tensor? initial_state=None) -> "
      "(Tensor y, Tensor final_state)");
  m.def(
      "wkv4_backward(Tensor? grad_y, Tensor? grad_final_state, Tensor k, Tensor v, Tensor w, "
      "Tensor u, Tensor? initial_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("wkv4_update(Tensor k, Tensor v, Tensor w, Tensor u, Tensor(a!) state) -> Tensor");
  m.def("matvec(Tensor x, Tensor weight) -> Tensor");
  m.def("matvec_int8(Tensor x, Tensor weight, Tensor scale) -> Tensor");
  m.def(
      "decode_layer(Tensor x, Tensor(a!) att_shift, Tensor(b!) wkv, Tensor(c!) ffn_shift, "
      "Tensor[] parameters, Tensor[] scales, float ln_eps, float ln_x_eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rwkv6, CPU, m) {
  m.impl("wkv", TORCH_BOX(&wkv));
  m.impl("wkv_final_state", TORCH_BOX(&wkv_final_state));
  m.impl("wkv_backward", TORCH_BOX(&wkv_backward));
  m.impl("wkv_checkpointed", TORCH_BOX(&wkv_checkpointed));
  m.impl("wkv_checkpointed_backward", TORCH_BOX(&wkv_checkpointed_backward));
  m.impl("wkv_update", TORCH_BOX(&wkv_update));
  m.impl("wkv4", TORCH_BOX(&wkv4));
  m.impl("wkv4_backward", TORCH_BOX(&wkv4_backward));
  m.impl("wkv4_update", TORCH_BOX(&wkv4_update));
  m.impl("matvec", TORCH_BOX(&matvec));
  m.impl("matvec_int8", TORCH_BOX(&matvec_int8));
  m.impl("decode_layer", TORCH_BOX(&decode_layer));
}

// The CUDA kernels are registered where torch is a CUDA build, the kernel library has them and the
// driver runs them. On all other GPUs, and for the other operators,
// torch_rwkv6/registration/fallback.py runs the reference.
STABLE_TORCH_LIBRARY_IMPL(rwkv6, CUDA, m) {
  if (rwkv6_cuda_problem() || !current_stream()) return;
  m.impl("wkv", TORCH_BOX(&wkv));
  m.impl("wkv_final_state", TORCH_BOX(&wkv_final_state));
  m.impl("wkv_backward", TORCH_BOX(&wkv_backward));
  m.impl("wkv_checkpointed", TORCH_BOX(&wkv_checkpointed));
  m.impl("wkv_checkpointed_backward", TORCH_BOX(&wkv_checkpointed_backward));
  m.impl("wkv_update", TORCH_BOX(&wkv_update));
}
