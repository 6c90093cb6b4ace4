// Views of tensors as raw pointers and strides: what the kernels are given, on the CPU as on a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define RWKV6_HOST_DEVICE __host__ __device__
#else
#define RWKV6_HOST_DEVICE
#endif

namespace rwkv6 {

constexpr int64_t kMaxHeadSize = 256;

enum class DType : uint8_t { f64, f32, bf16, f16, i8 };  // i8: quantised weights alone

RWKV6_HOST_DEVICE inline int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : dtype == DType::i8 ? 1 : 2;
}

// The dtype of the state and of the accumulator, for inputs of this dtype.
inline DType state_dtype(DType inputs) { return inputs == DType::f64 ? DType::f64 : DType::f32; }

// A [B, T, H, N] tensor; strides in elements, N contiguous.
struct Tokens {
  char* data = nullptr;  // nullptr: absent, reads as zeros
  DType dtype = DType::f32;
  int64_t stride_b = 0, stride_t = 0, stride_h = 0;

  // The row of N values of one token and head.
  RWKV6_HOST_DEVICE char* row(int64_t b, int64_t t, int64_t h) const {
    return data ? data + (b * stride_b + t * stride_t + h * stride_h) * size_of(dtype) : nullptr;
  }
  // Bytes from one row to that of another token and head.
  RWKV6_HOST_DEVICE int64_t distance(int64_t t, int64_t h) const {
    return (t * stride_t + h * stride_h) * size_of(dtype);
  }
};

// A [H, N] or [B, H, N] tensor, N contiguous.
struct Heads {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride_h = 0;
  int64_t stride_b = 0;  // 0: all batch rows share one [H, N]

  RWKV6_HOST_DEVICE char* row(int64_t h, int64_t b = 0) const {
    return data + (b * stride_b + h * stride_h) * size_of(dtype);
  }
};

// A [S, H, N, N] tensor, each state [key][value] with contiguous values.
struct States {
  char* data = nullptr;  // nullptr: absent, reads as zeros
  DType dtype = DType::f32;
  int64_t stride_s = 0, stride_h = 0, stride_row = 0;

  RWKV6_HOST_DEVICE char* matrix(int64_t s, int64_t h) const {
    return data ? data + (s * stride_s + h * stride_h) * size_of(dtype) : nullptr;
  }
};

// A vector of int32 or int64.
struct Indices {
  const void* data = nullptr;  // nullptr: absent
  bool wide = false;           // int64
  int64_t stride = 1;          // in elements

  RWKV6_HOST_DEVICE int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i * stride]
                : static_cast<const int32_t*>(data)[i * stride];
  }
};

}  // namespace rwkv6
