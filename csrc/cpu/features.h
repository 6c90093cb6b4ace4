// Which instruction sets the processor and the operating system support, from CPUID: the compiler's
// __builtin_cpu_supports reports none under some runtime libraries.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>

namespace rwkv6 {

class CpuFeatures {
  uint32_t leaf1_ecx_ = 0, leaf7_ebx_ = 0;  // of CPUID
  uint64_t saved_ = 0;                      // XCR0: registers that the system saves for a thread

  static bool all(uint64_t set, uint64_t wanted) { return (set & wanted) == wanted; }
  static constexpr uint64_t bit(int n) { return uint64_t(1) << n; }

 public:
  CpuFeatures() {
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &leaf1_ecx_, &edx)) return;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) leaf7_ebx_ = ebx;
    if (!all(leaf1_ecx_, bit(27))) return;  // OSXSAVE: XGETBV exists
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    saved_ = uint64_t(high) << 32 | low;
  }

  // AVX2, FMA and F16C, which the kernels of isa_avx2.cpp are compiled for.
  bool avx2() const {
    return all(saved_, bit(1) | bit(2)) &&                  // XMM, YMM
           all(leaf1_ecx_, bit(12) | bit(28) | bit(29)) &&  // FMA, AVX, F16C
           all(leaf7_ebx_, bit(5));                         // AVX2
  }

  // Also AVX-512 F, BW, DQ and VL, which the kernels of isa_avx512.cpp are compiled for.
  bool avx512() const {
    return avx2() && all(saved_, bit(5) | bit(6) | bit(7)) &&       // masks, ZMM
           all(leaf7_ebx_, bit(16) | bit(17) | bit(30) | bit(31));  // F, DQ, BW, VL
  }
};

}  // namespace rwkv6
#endif
