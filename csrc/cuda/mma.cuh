// Tensor cores: the PTX instructions that the chunked kernels are made of.
//
// A warp's lanes are (g, t) = (lane / 4, lane % 4), as in the PTX manual's fragment layouts. The
// products are TF32 with f32 sums: of 16-bit inputs nothing is lost, and what is computed from them
// (decayed rows, states) keeps 11 bits where bf16 would keep 8. What a state is made of keeps 22.
// No f32 input ever comes here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/cp_async.cuh"

namespace rwkv6::cuda {

// The mma instruction ignores the 13 low bits of an operand, which makes it smaller by a factor of
// 1 - 3.5e-4 on average. An operand that was multiplied by kToTf32 before has an error of mean 0,
// hardly larger than that of the nearest TF32; one that is a TF32 already stays what it is; NaN and
// infinity stay NaN and infinity.
constexpr float kToTf32 = 1.f + 0.7213f / 2048;
__device__ inline uint32_t tf32(float x) { return __float_as_uint(x * kToTf32); }

// x as the sum of two operands, 22 bits of it.
struct TwoTf32 {
  uint32_t high, low;
  __device__ explicit TwoTf32(float x) {
    high = __float_as_uint(x) & 0xffffe000u;
    low = __float_as_uint(x - __uint_as_float(high));
  }
};

// c += a b: a [16 rows, 8], b [8, 8 columns].
//   a = (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   b = (t, g), (t + 4, g)
//   c = (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The 16-bit dtypes: two neighbours at a time, the first in the low half. kFine: beside the rounding
// of outputs to this dtype 11 bits of every factor are too few.
struct Bf16 {
  static constexpr bool kFine = false;
  static __device__ float low(uint32_t x) { return __uint_as_float(x << 16); }
  static __device__ float high(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }
  static __device__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(x);
  }
  // c += a b, exactly: a [16 rows, 16], b [16, 8 columns], each register two neighbours along the
  // sum: a = (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), b = (2t, g), (2t + 8, g).
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct F16 {
  static constexpr bool kFine = true;
  static __device__ float low(uint32_t x) {
    return __low2float(reinterpret_cast<const __half2&>(x));
  }
  static __device__ float high(uint32_t x) {
    return __high2float(reinterpret_cast<const __half2&>(x));
  }
  static __device__ uint32_t pack(float low, float high) {
    const __half2 x = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(x);
  }
  static __device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8 (16 bytes) and
// gets the elements (g, 2t) and (g, 2t + 1) of each.
__device__ inline void load_matrices(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace rwkv6::cuda
