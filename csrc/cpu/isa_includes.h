// Everything that the kernels include, before the file switches its instruction set on. An inline
// function of a standard header is compiled in every file that uses it, and the linker keeps one of
// these copies for all. Had it been compiled for AVX-512, it would crash an older CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define RWKV6_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define RWKV6_ADDRESS_SANITIZER
#endif
#endif
#ifdef RWKV6_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#endif

#include "../huge_pages.h"
#include "kernels.h"

#define RWKV6_NAME_OF(x) #x
#define RWKV6_NAME(x) RWKV6_NAME_OF(x)
