// Stands in for XLA: calls a handler as XLA's CUDA platform does, with a call frame, a stream and
// scratch memory. As strict as XLA: no more than 16-byte alignment may be asked for, and no more is
// given.
#include <ATen/dlpack.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "xla/ffi/api/c_api.h"

struct XLA_FFI_Error {
  std::string message;
};

struct XLA_FFI_ExecutionContext {
  void* stream;
  void* (*allocate)(void* unused, size_t bytes);
  int allocated, freed;
};

namespace {

constexpr size_t kAlignment = 16;

XLA_FFI_Error* create_error(XLA_FFI_Error_Create_Args* args) {
  return new XLA_FFI_Error{args->message};
}

void get_message(XLA_FFI_Error_GetMessage_Args* args) {
  args->message = args->error->message.c_str();
}

void destroy_error(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }

XLA_FFI_Error* get_stream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = args->ctx->stream;
  return nullptr;
}

XLA_FFI_Error* allocate(XLA_FFI_DeviceMemory_Allocate_Args* args) {
  if (args->alignment > kAlignment) return new XLA_FFI_Error{"Unsupported alignment"};
  char* memory = static_cast<char*>(args->ctx->allocate(nullptr, args->size + kAlignment));
  args->ctx->allocated++;
  args->data = memory + kAlignment;
  return nullptr;
}

XLA_FFI_Error* release(XLA_FFI_DeviceMemory_Free_Args* args) {
  args->ctx->freed++;
  return nullptr;
}

XLA_FFI_DataType dtype_of(const DLTensor& x) {
  if (x.dtype.code == kDLInt) return XLA_FFI_DataType_S32;
  if (x.dtype.code == kDLBfloat) return XLA_FFI_DataType_BF16;
  if (x.dtype.bits == 16) return XLA_FFI_DataType_F16;
  return x.dtype.bits == 32 ? XLA_FFI_DataType_F32 : XLA_FFI_DataType_F64;
}

// The tensors as XLA's buffers.
struct Buffers {
  std::vector<XLA_FFI_Buffer> buffers;
  std::vector<void*> pointers;

  Buffers(DLTensor* const* tensors, int count) {
    for (int i = 0; i < count; i++) {
      const DLTensor& x = *tensors[i];
      buffers.push_back(
          {XLA_FFI_Buffer_STRUCT_SIZE, nullptr, dtype_of(x), x.data, x.ndim, x.shape});
    }
    for (XLA_FFI_Buffer& buffer : buffers) pointers.push_back(&buffer);
  }
};

}  // namespace

// Calls the handler for contiguous tensors. NULL, or what was wrong, until the next call.
extern "C" const char* xla_call(XLA_FFI_Handler* handler, void* stream,
                                void* (*device_allocate)(void*, size_t), DLTensor* const* operands,
                                int operand_count, DLTensor* const* results, int result_count,
                                int64_t states) {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                     XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = create_error;
  api.XLA_FFI_Error_GetMessage = get_message;
  api.XLA_FFI_Error_Destroy = destroy_error;
  api.XLA_FFI_Stream_Get = get_stream;
  api.XLA_FFI_DeviceMemory_Allocate = allocate;
  api.XLA_FFI_DeviceMemory_Free = release;

  Buffers arguments(operands, operand_count), returns(results, result_count);
  std::vector<XLA_FFI_ArgType> argument_types(arguments.buffers.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> return_types(returns.buffers.size(), XLA_FFI_RetType_BUFFER);
  XLA_FFI_Scalar value = {XLA_FFI_DataType_S64, &states};
  XLA_FFI_ByteSpan name = {"states", std::strlen("states")};
  XLA_FFI_AttrType attribute_type = XLA_FFI_AttrType_SCALAR;
  XLA_FFI_ByteSpan* names[] = {&name};
  void* attributes[] = {&value};
  XLA_FFI_ExecutionContext context = {stream, device_allocate, 0, 0};

  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.ctx = &context;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, operand_count, argument_types.data(),
                arguments.pointers.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, result_count, return_types.data(),
                returns.pointers.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, 1, &attribute_type, names, attributes};

  static std::string message;
  message.clear();
  if (XLA_FFI_Error* error = handler(&frame)) {
    message = error->message;
    delete error;
  }
  if (context.allocated != context.freed) message += " scratch memory was not given back";
  return message.empty() ? nullptr : message.c_str();
}
