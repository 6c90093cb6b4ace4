// The compiler's own target: SSE2 on x86-64, NEON on AArch64.
#define RWKV6_ISA baseline
#define RWKV6_VECTOR_BYTES 16
#if defined(__aarch64__)
#define RWKV6_TILE_ROWS 8
#define RWKV6_TILE_VECTORS 2
#define RWKV6_FMA_F32(a, b, c) vfmaq_f32(c, a, b)
#define RWKV6_FMA_F64(a, b, c) vfmaq_f64(c, a, b)
#else
#define RWKV6_TILE_ROWS 4
#define RWKV6_TILE_VECTORS 1
#endif
#include "isa_includes.h"

#include "isa.inc"
