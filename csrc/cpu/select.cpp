#include "select.h"

#include <cstdlib>
#include <cstring>

#include "features.h"

// RWKV6_BASELINE_ONLY leaves the wider instruction sets out, for a quick build.
#if defined(__x86_64__) && !defined(RWKV6_BASELINE_ONLY)
#define RWKV6_WIDER_X86
#endif

namespace rwkv6 {

#if defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#else
namespace baseline {
extern const Kernels kernels;
}
#endif
#ifdef RWKV6_WIDER_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

struct Level {
  const Kernels* kernels;
  bool (*available)();  // on this CPU
};

// The best first.
const Level kLevels[] = {
#ifdef RWKV6_WIDER_X86
    {&avx512::kernels, [] { return CpuFeatures().avx512(); }},
    {&avx2::kernels, [] { return CpuFeatures().avx2(); }},
#endif
#if defined(__aarch64__)
    {&neon::kernels, [] { return true; }},
#else
    {&baseline::kernels, [] { return true; }},
#endif
};

// What RWKV6_CPU_ISA names; empty if nothing.
const char* forced() {
  const char* name = getenv("RWKV6_CPU_ISA");
  return name ? name : "";
}

}  // namespace

const Kernels* select_kernels() {
  static const Kernels* const chosen = []() -> const Kernels* {
    const char* wanted = forced();
    for (const Level& level : kLevels)
      if ((!*wanted || strcmp(wanted, level.kernels->name) == 0) && level.available())
        return level.kernels;
    return nullptr;
  }();
  return chosen;
}

std::string no_kernels_message() {
  std::string names;
  for (const Level& level : kLevels)
    if (level.available()) names += (names.empty() ? "" : ", ") + std::string(level.kernels->name);
  return "RWKV6_CPU_ISA: expected one that this CPU has (" + names + "), got " + forced();
}

}  // namespace rwkv6
