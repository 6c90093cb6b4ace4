// The compiler's own target, where it is not AArch64 (isa_neon.cpp): SSE2 on x86-64.
#if !defined(__aarch64__)
#define RWKV6_ISA baseline
#define RWKV6_VECTOR_BYTES 16
#define RWKV6_TILE_ROWS 4
#define RWKV6_TILE_VECTORS 2
#define RWKV6_TILE_PASSES 2
#include "isa_includes.h"

#include "isa.inc"
#endif
