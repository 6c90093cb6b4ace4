// One access to shared memory by a warp, whose lanes are `stride` bytes apart.
#include <cuda_runtime.h>

#include <cstdint>

extern __shared__ __align__(16) char memory[];

template <class T>
__device__ void load(T* out, int stride) {
  out[threadIdx.x] = *reinterpret_cast<const T*>(memory + threadIdx.x * stride);
}
extern "C" __global__ void load2(uint16_t* out, int stride) { load(out, stride); }
extern "C" __global__ void load4(float* out, int stride) { load(out, stride); }
extern "C" __global__ void load8(float2* out, int stride) { load(out, stride); }
extern "C" __global__ void load16(float4* out, int stride) { load(out, stride); }
extern "C" __global__ void store4(float* in, int stride) {
  *reinterpret_cast<float*>(memory + threadIdx.x * stride) = in[threadIdx.x];
}

__device__ uint32_t row_of_lane(int stride) {
  return uint32_t(__cvta_generic_to_shared(memory + threadIdx.x * stride));
}

extern "C" __global__ void load_matrices(uint4* out, int stride) {
  uint4 d;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
               : "r"(row_of_lane(stride)));
  out[threadIdx.x] = d;
}
extern "C" __global__ void copy16(const uint4* in, int stride) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(row_of_lane(stride)),
               "l"(in + threadIdx.x)
               : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
}
