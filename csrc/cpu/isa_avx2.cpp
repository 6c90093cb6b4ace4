// x86-64 with AVX2, FMA and F16C (2013 on).
#if defined(__x86_64__)
#define RWKV6_ISA avx2
#define RWKV6_VECTOR_BYTES 32
#define RWKV6_TILE_ROWS 4
#define RWKV6_TILE_VECTORS 2
#define RWKV6_TILE_PASSES 2
#define RWKV6_FMA_F32 _mm256_fmadd_ps
#define RWKV6_FMA_F64 _mm256_fmadd_pd
#define RWKV6_MIN_F32 _mm256_min_ps
#define RWKV6_MAX_F32 _mm256_max_ps
#define RWKV6_INT8_LOAD(p) \
  _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))
#define RWKV6_F16_LOAD(p) _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))
#define RWKV6_F16_STORE(p, x)                     \
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), \
                   _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#include "isa_includes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "isa.inc"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
