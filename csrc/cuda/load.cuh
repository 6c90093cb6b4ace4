// Rows of any dtype, 16 bytes of accumulators at a time: four floats or two doubles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "cuda/cp_async.cuh"
#include "views.h"

namespace rwkv6::cuda {

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

// By its bits: __bfloat162float's PTX would depend on the architecture, which nothing else here does.
__device__ inline float widen(__nv_bfloat16 x) {
  return __uint_as_float(uint32_t(__bfloat16_as_ushort(x)) << 16);
}
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

// Element i of a row; f64 is met with T = double only.
template <class T>
__device__ T load_element(const char* row, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64:
      if constexpr (sizeof(T) == 8) return reinterpret_cast<const double*>(row)[i];
      return T(0);
    case DType::f32: return reinterpret_cast<const float*>(row)[i];
    case DType::bf16: return widen(reinterpret_cast<const __nv_bfloat16*>(row)[i]);
    default: return widen(reinterpret_cast<const __half*>(row)[i]);
  }
}

__device__ inline void narrow(double x, double& to) { to = x; }
template <class T>
__device__ void narrow(T x, float& to) {
  to = float(x);
}
template <class T>
__device__ void narrow(T x, __nv_bfloat16& to) {
  to = __float2bfloat16_rn(float(x));
}
template <class T>
__device__ void narrow(T x, __half& to) {
  to = __float2half_rn(float(x));
}

template <class T>
__device__ void store_element(char* row, DType dtype, int64_t i, T x) {
  switch (dtype) {
    case DType::f64:
      if constexpr (sizeof(T) == 8) narrow(x, reinterpret_cast<double*>(row)[i]);
      break;
    case DType::f32: narrow(x, reinterpret_cast<float*>(row)[i]); break;
    case DType::bf16: narrow(x, reinterpret_cast<__nv_bfloat16*>(row)[i]); break;
    default: narrow(x, reinterpret_cast<__half*>(row)[i]);
  }
}

// The elements of a pack, from kSize values of E that one load reads.
template <class T, class E>
__device__ Pack<T> load_vector(const char* from) {
  struct alignas(Pack<T>::kSize * sizeof(E)) Raw {
    E x[Pack<T>::kSize];
  };
  const Raw raw = *reinterpret_cast<const Raw*>(from);
  Pack<T> pack;
#pragma unroll
  for (int e = 0; e < Pack<T>::kSize; e++) pack.x[e] = widen(raw.x[e]);
  return pack;
}

// Up to kSize elements, of which `count` exist and the rest are zeros; vector: `from` is aligned so
// that one load reads a pack.
template <class T>
__device__ Pack<T> load_pack(const char* from, DType dtype, int64_t count, bool vector) {
  if (vector && count >= Pack<T>::kSize) {
    switch (dtype) {
      case DType::f64:
        if constexpr (sizeof(T) == 8) return load_vector<T, double>(from);
        break;
      case DType::f32: return load_vector<T, float>(from);
      case DType::bf16: return load_vector<T, __nv_bfloat16>(from);
      default: return load_vector<T, __half>(from);
    }
  }
  Pack<T> pack;
#pragma unroll
  for (int e = 0; e < Pack<T>::kSize; e++)
    pack.x[e] = e < count ? load_element<T>(from, dtype, e) : T(0);
  return pack;
}

// The first `count` elements of a pack; vector: as above.
template <class T, class E>
__device__ void store_vector(char* to, const Pack<T>& pack) {
  struct alignas(Pack<T>::kSize * sizeof(E)) Raw {
    E x[Pack<T>::kSize];
  } raw;
#pragma unroll
  for (int e = 0; e < Pack<T>::kSize; e++) narrow(pack.x[e], raw.x[e]);
  typedef std::conditional_t<sizeof(Raw) == 16, uint4,
                             std::conditional_t<sizeof(Raw) == 8, uint2, unsigned>>
      Words;
  Words words;
  memcpy(&words, &raw, sizeof(words));
  *reinterpret_cast<Words*>(to) = words;  // one store
}
template <class T>
__device__ void store_pack(char* to, DType dtype, const Pack<T>& pack, int64_t count, bool vector) {
  if (vector && count >= Pack<T>::kSize) {
    switch (dtype) {
      case DType::f64:
        if constexpr (sizeof(T) == 8) store_vector<T, double>(to, pack);
        return;
      case DType::f32: return store_vector<T, float>(to, pack);
      case DType::bf16: return store_vector<T, __nv_bfloat16>(to, pack);
      default: return store_vector<T, __half>(to, pack);
    }
  }
#pragma unroll
  for (int e = 0; e < Pack<T>::kSize; e++)
    if (e < count) store_element(to, dtype, e, pack.x[e]);
}

template <class T>
__device__ Pack<T> zeros() {
  Pack<T> pack;
#pragma unroll
  for (int e = 0; e < Pack<T>::kSize; e++) pack.x[e] = T(0);
  return pack;
}

// A thread unpacks what it has copied itself.

// Starts to copy the elements of a pack, as they are, to the start of its place.
template <class T>
__device__ void fetch_pack(Pack<T>* place, const char* from, DType dtype, int64_t count,
                           bool vector) {
  constexpr int kSize = Pack<T>::kSize;
  const int size = int(size_of(dtype));
  if (vector && count >= kSize) {
    if (size * kSize == 16)
      cp_async<16>(place, from);
    else
      cp_async<8>(place, from);
    return;
  }
  char* to = reinterpret_cast<char*>(place);
#pragma unroll 1
  for (int e = 0; e < kSize && e < count; e++, to += size, from += size) {
    if (size == 8)
      cp_async<8>(to, from);
    else if (size == 4)
      cp_async<4>(to, from);
    else
      *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
  }
}

// What fetch_pack has brought.
template <class T>
__device__ Pack<T> unpack(const Pack<T>* place, DType dtype, int64_t count) {
  if (count <= 0) return zeros<T>();
  return load_pack<T>(reinterpret_cast<const char*>(place), dtype, count, true);
}

// Whether every row of x starts where a pack of the accumulator's type T can be read at once.
template <class T>
bool is_vector_aligned(const void* data, DType dtype, int64_t strides) {
  const int64_t bytes = Pack<T>::kSize * size_of(dtype);
  return (reinterpret_cast<int64_t>(data) | strides * size_of(dtype)) % bytes == 0;
}
template <class T>
bool has_vector_rows(const Tokens& x) {
  return is_vector_aligned<T>(x.data, x.dtype, x.stride_b | x.stride_t | x.stride_h);
}
template <class T>
bool has_vector_rows(const States& x) {
  return is_vector_aligned<T>(x.data, x.dtype, x.stride_s | x.stride_h | x.stride_row);
}

}  // namespace rwkv6::cuda
