// What nvcc makes of everyday code, for test_ptxcpu.py to compare with NumPy.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mma.sync: C[16][8] = A[16][K] B[K][8], all row-major ----

extern "C" __global__ void mma_tf32_k8(const float* A, const float* B, float* C) {
  int lane = threadIdx.x, g = lane / 4, q = lane % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; i++) {
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(a[i]) : "f"(A[(g + i % 2 * 8) * 8 + q + i / 2 * 4]));
  }
  for (int i = 0; i < 2; i++) {
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(b[i]) : "f"(B[(q + i * 4) * 8 + g]));
  }
  float c[4] = {};
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  for (int i = 0; i < 4; i++) C[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = c[i];
}

extern "C" __global__ void mma_f16_k16(const __half* A, const __half* B, float* C) {
  int lane = threadIdx.x, g = lane / 4, q = lane % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; i++) {
    const __half* row = A + (g + i % 2 * 8) * 16 + 2 * q + i / 2 * 8;
    a[i] = *reinterpret_cast<const uint32_t*>(row);
  }
  for (int i = 0; i < 2; i++) {
    __half2 two = {B[(2 * q + i * 8) * 8 + g], B[(2 * q + 1 + i * 8) * 8 + g]};
    b[i] = *reinterpret_cast<uint32_t*>(&two);
  }
  float c[4] = {};
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  for (int i = 0; i < 4; i++) C[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = c[i];
}

// ---- cp.async: y[t] = x[t] in pieces, zeros from the given number of bytes of a piece on ----

template <int kBytes>
__device__ void copy_asynchronously(const char* x, char* y, int bytes) {
  __shared__ __align__(16) char buffer[2][32 * kBytes];
  int lane = threadIdx.x;
  for (int half = 0; half < 2; half++) {
    uint32_t to = shared_address(&buffer[half][lane * kBytes]);
    const char* from = x + (half * 32 + lane) * kBytes;
    if constexpr (kBytes == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                   "r"(bytes));
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(from), "r"(bytes),
                   "n"(kBytes));
    }
    asm volatile("cp.async.commit_group;");
  }
  for (int half = 0; half < 2; half++) {
    if (half == 0) asm volatile("cp.async.wait_group 1;" ::: "memory");
    if (half == 1) asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncwarp();
    for (int i = 0; i < kBytes; i++)
      y[half * 32 * kBytes + i * 32 + lane] = buffer[half][i * 32 + lane];
  }
}
extern "C" __global__ void copy4(const char* x, char* y, int n) { copy_asynchronously<4>(x, y, n); }
extern "C" __global__ void copy8(const char* x, char* y, int n) { copy_asynchronously<8>(x, y, n); }
extern "C" __global__ void copy16(const char* x, char* y, int n) {
  copy_asynchronously<16>(x, y, n);
}

// ---- named barriers: warps 0 and 1 produce for warps 2 and 3, which wait for them ----

extern "C" __global__ void produce_and_consume(const float* x, float* y, int rounds) {
  __shared__ float buffer[64];
  int t = threadIdx.x % 64;
  if (threadIdx.x < 64) {
    for (int i = 0; i < rounds; i++) {
      asm volatile("bar.sync 2, 128;" ::: "memory");  // it is empty
      buffer[t] = x[i * 64 + t];
      asm volatile("bar.arrive 1, 128;" ::: "memory");  // it is full
    }
  } else {
    for (int i = 0; i < rounds; i++) {
      asm volatile("bar.arrive 2, 128;" ::: "memory");
      asm volatile("bar.sync 1, 128;" ::: "memory");
      y[i * 64 + t] = buffer[63 - t] + buffer[0];
    }
  }
}
// The consumers do not say that they have read.
extern "C" __global__ void produce_too_early(const float* x, float* y, int rounds) {
  __shared__ float buffer[64];
  int t = threadIdx.x % 64;
  for (int i = 0; i < rounds; i++) {
    if (threadIdx.x < 64) {
      buffer[t] = x[i * 64 + t];
      asm volatile("bar.arrive 1, 128;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 128;" ::: "memory");
      y[i * 64 + t] = buffer[63 - t];
    }
  }
}
extern "C" __global__ void copy_over_what_is_read(const float* x, float* y) {
  __shared__ __align__(16) float buffer[128];
  int t = threadIdx.x;
  uint32_t to = shared_address(&buffer[4 * (t % 32)]);
  for (int i = 0; i < 2; i++) {
    if (t < 32) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(x + i * 128 + 4 * t));
      asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    y[i * 128 + t] = buffer[t] + buffer[(t + 1) % 128];
  }
}

// Nothing is wrong with this one.
extern "C" __global__ void double_buffered(const float* x, float* y, int rounds) {
  __shared__ __align__(16) float buffer[2][512];
  int t = threadIdx.x;
  auto load = [&](int i) {
    uint32_t to = shared_address(&buffer[i % 2][4 * t]);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(x + i * 512 + 4 * t));
    asm volatile("cp.async.commit_group;");
  };
  load(0);
  for (int i = 0; i < rounds; i++) {
    if (i + 1 < rounds) {
      load(i + 1);
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    for (int j = 0; j < 4; j++) {
      y[i * 512 + j * 128 + t] = buffer[i % 2][511 - j * 128 - t] + buffer[i % 2][0];
    }
    __syncthreads();
  }
}

// ---- block-wide reductions ----

extern "C" __global__ void block_votes(const int* x, int* y) {
  int holds = x[blockIdx.x * blockDim.x + threadIdx.x];
  int n = __syncthreads_count(holds), all = __syncthreads_and(holds), any = __syncthreads_or(holds);
  if (threadIdx.x == 0) {
    y[3 * blockIdx.x] = n;
    y[3 * blockIdx.x + 1] = all != 0;
    y[3 * blockIdx.x + 2] = any != 0;
  }
}

// ---- a structure of parameters, indexed at run time ----

struct Table {
  long long stride;
  float values[16];
  const float* rows[2];
};
extern "C" __global__ void parameter_structure(const __grid_constant__ Table table, float* y) {
  int t = threadIdx.x;
  y[t] = table.values[t % 16] + table.rows[t & 1][t * table.stride];
}
__device__ __noinline__ float read_generic(const float* p) { return *p; }
extern "C" __global__ void parameter_address(const __grid_constant__ Table table, float* y) {
  y[threadIdx.x] = read_generic(&table.values[threadIdx.x % 16]);
}

// ---- calls ----

__device__ __noinline__ float horner(float x, int n) {
  float sum = 0;
  for (int i = 0; i < n; i++) {
    if (sum > 1e6f) return -1;
    sum = sum * x + 1;
  }
  return sum;
}
__device__ __noinline__ double twice(double x) { return x + horner(float(x), 2); }
extern "C" __global__ void calls(const float* x, double* y) {
  int t = threadIdx.x;
  y[t] = t % 3 ? twice(x[t]) : double(horner(x[t], t));
}

// ---- integers: y[12][n] ----

extern "C" __global__ void integers(const long long* a, const long long* b, long long* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  long long p = a[i], q = b[i];
  unsigned u = unsigned(p), v = unsigned(q);
  long long out[] = {
      q ? p / q : 0,
      q ? p % q : 0,
      (long long)(q ? (unsigned long long)p / (unsigned long long)q : 0),
      __mul64hi(p, q),
      (long long)__umul64hi(p, q),
      (long long)__byte_perm(u, v, 0x5142),
      (long long)((u >> 5) & 0x7f) | (long long)((u & 0xfffff00f) | ((v & 0xff) << 4)) << 16,
      __clzll(p) + 100 * __popcll(q) + 10000 * __ffs(int(u)),
      (long long)__brevll(p),
      (long long)__funnelshift_l(u, v, q & 31) + __funnelshift_rc(u, v, q & 63),
      (long long)(int(u) >> (v & 31)) + min(int(u), int(v)),
      (long long)__dp4a(int(u), int(v), 7),
  };
  for (int j = 0; j < 12; j++) y[(long long)j * n + i] = out[j];
}

// ---- floating point: y[14][n] ----

extern "C" __global__ void doubles(const double* a, const double* b, double* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  double p = a[i], q = b[i];
  double out[] = {p + q,         p - q,      p * q,        p / q,  fma(p, q, p),
                  sqrt(fabs(p)), exp(p),     log(fabs(p)), 1 / q,  rsqrt(fabs(p)),
                  fmin(p, q),    fmax(p, q), floor(p),     tanh(p)};
  for (int j = 0; j < 14; j++) y[(long long)j * n + i] = out[j];
}

extern "C" __global__ void floats(const float* a, const float* b, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float p = a[i], q = b[i], fast;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(fast) : "f"(p));
  float out[] = {p + q,
                 p / q,
                 __fdividef(p, q),
                 fast,
                 __expf(p),
                 expf(p),
                 exp2f(q),
                 log1pf(fabsf(p)),
                 rsqrtf(fabsf(p)),
                 __saturatef(p),
                 floorf(p) + rintf(q),
                 float(int(p)) + float(unsigned(fabsf(q))),
                 __bfloat162float(__float2bfloat16_rn(p)) + __half2float(__float2half_rn(q)),
                 isnan(p) ? 1.f : copysignf(q, p)};
  for (int j = 0; j < 14; j++) y[(long long)j * n + i] = out[j];
}

// ---- 16-bit pairs: y[8][n] ----

extern "C" __global__ void bfloat16_pairs(const __nv_bfloat162* a, const __nv_bfloat162* b,
                                          __nv_bfloat162* y, int n) {
  int i = threadIdx.x;
  if (i >= n) return;
  __nv_bfloat162 p = a[i], q = b[i];
  __nv_bfloat162 out[] = {__hadd2(p, q),
                          __hsub2(p, q),
                          __hmul2(p, q),
                          __hfma2(p, q, q),
                          __hmax2(p, q),
                          __hneg2(p),
                          __float22bfloat162_rn({1.001f, -3.f}),
                          __halves2bfloat162(__high2bfloat16(p), __low2bfloat16(q))};
  for (int j = 0; j < 8; j++) y[j * n + i] = out[j];
}

// ---- cache hints and the rest of memory ----

extern "C" __global__ void cache_hints(const float4* x, float4* y, unsigned char* bytes) {
  int t = threadIdx.x;
  float4 a = __ldcs(x + t), b = __ldcg(x + t), c;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(c.x), "=f"(c.y), "=f"(c.z), "=f"(c.w)
               : "l"(x + t));
  a.x += b.x + c.w;
  __stcs(y + t, a);
  bytes[t] = static_cast<unsigned char>(bytes[t] + 250);
  __nanosleep(20);
  __threadfence();
}

// An array that is indexed at run time: local memory.
extern "C" __global__ void local_array(const int* x, int* y) {
  int values[16], t = threadIdx.x;
  for (int i = 0; i < 16; i++) values[i] = x[16 * t + i];
  for (int i = 0; i < 16; i++) values[x[i] & 15] += i;
  int sum = 0;
  for (int i = 0; i < 16; i++) sum = sum * 3 + values[(i * t) & 15];
  y[t] = sum;
}

template <class T>
__device__ void transpose_by_shuffles(const T* x, T* y) {
  int t = threadIdx.x;
  T mine = x[t];
  y[t] = __shfl_sync(~0u, mine, t % 4 * 8 + t / 4);
  y[32 + t] = __shfl_xor_sync(0xffffffffu, mine, 5, 8);
}
extern "C" __global__ void shuffle_doubles(const double* x, double* y) {
  transpose_by_shuffles(x, y);
}

extern "C" __global__ void warp_reductions(const int* x, int* y) {
  int t = threadIdx.x, v = x[t];
  y[t] = __reduce_add_sync(~0u, v);
  y[32 + t] = __reduce_min_sync(~0u, v);
  y[64 + t] = __match_any_sync(~0u, v & 3);
}
