// x86-64 with AVX-512 (F, BW, DQ, VL), AVX2, FMA and F16C (2017 on).
#if defined(__x86_64__)
#define RWKV6_ISA avx512
#define RWKV6_VECTOR_BYTES 64
#define RWKV6_TILE_ROWS 8
#define RWKV6_TILE_VECTORS 4
#define RWKV6_TILE_PASSES 1
#define RWKV6_FMA_F32 _mm512_fmadd_ps
#define RWKV6_FMA_F64 _mm512_fmadd_pd
// the masked forms, because GCC 12 warns about the "undefined" third operand of the plain ones
#define RWKV6_MIN_F32(a, b) _mm512_maskz_min_ps(0xffff, a, b)
#define RWKV6_MAX_F32(a, b) _mm512_maskz_max_ps(0xffff, a, b)
#define RWKV6_SCALE_F32(p, n) _mm512_maskz_scalef_ps(0xffff, p, n)       // p * 2^floor(n)
#define RWKV6_MINUS_NEAREST_F32(x) _mm512_maskz_reduce_ps(0xffff, x, 8)  // without exceptions
#define RWKV6_MINUS_FLOOR_F32(x) _mm512_maskz_reduce_ps(0xffff, x, 9)
#define RWKV6_INT8_LOAD(p)  \
  _mm512_maskz_cvtepi32_ps( \
      0xffff,               \
      _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))
#define RWKV6_F16_LOAD(p) \
  _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))
#define RWKV6_F16_STORE(p, x)        \
  _mm256_storeu_si256(               \
      reinterpret_cast<__m256i*>(p), \
      _mm512_maskz_cvtps_ph(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#include "isa_includes.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif

#include "isa.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
