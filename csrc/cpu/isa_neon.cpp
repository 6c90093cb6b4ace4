// AArch64, where NEON with its fused multiply-add and f16 conversions is always there.
#if defined(__aarch64__)
#define RWKV6_ISA neon
#define RWKV6_VECTOR_BYTES 16
#define RWKV6_TILE_ROWS 8
#define RWKV6_FMA_F32(a, b, c) vfmaq_f32(c, a, b)
#define RWKV6_FMA_F64(a, b, c) vfmaq_f64(c, a, b)
#define RWKV6_F16_LOAD(p, out) vst1q_f32(out, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))))
#define RWKV6_F16_STORE(in, p) vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(in))))
#include "isa_includes.h"

#include "isa.inc"
#endif
