// AArch64, where NEON with its fused multiply-add and f16 conversions is always there.
#if defined(__aarch64__)
#define RWKV6_ISA neon
#define RWKV6_VECTOR_BYTES 16
#define RWKV6_TILE_ROWS 8
#define RWKV6_TILE_VECTORS 2
#define RWKV6_TILE_PASSES 1
#define RWKV6_FMA_F32(a, b, c) vfmaq_f32(c, a, b)
#define RWKV6_FMA_F64(a, b, c) vfmaq_f64(c, a, b)
#define RWKV6_F16_LOAD(p) vcvt_f32_f16(vld1_f16(reinterpret_cast<const float16_t*>(p)))
#define RWKV6_F16_STORE(p, x) vst1_f16(reinterpret_cast<float16_t*>(p), vcvt_f16_f32(x))
#include "isa_includes.h"

#include "isa.inc"
#endif
