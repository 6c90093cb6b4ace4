#include "select.h"

#include <cstdlib>
#include <cstring>

#include "features.h"

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
#if defined(__x86_64__)
// Weak: a build that is to be quick leaves a wider instruction set out. It then has no address.
namespace avx2 {
extern const Kernels kernels __attribute__((weak));
}
namespace avx512 {
extern const Kernels kernels __attribute__((weak));
}
#endif

namespace {

struct Level {
  const Kernels* kernels;  // nullptr where the build has left it out
  bool (*on_this_cpu)();

  bool available() const { return kernels && on_this_cpu(); }
};

// The best first.
const Level kLevels[] = {
#if defined(__x86_64__)
    {&avx512::kernels, [] { return CpuFeatures().avx512(); }},
    {&avx2::kernels, [] { return CpuFeatures().avx2(); }},
#endif
#if defined(__aarch64__)
    {&neon::kernels, [] { return true; }},
#else
    {&baseline::kernels, [] { return true; }},
#endif
};

// What RWKV6_CPU_ISA names, or nothing.
const char* forced() {
  const char* name = getenv("RWKV6_CPU_ISA");
  return name ? name : "";
}

}  // namespace

const Kernels* select_kernels() {
  static const Kernels* const chosen = []() -> const Kernels* {
    const char* wanted = forced();
    for (const Level& level : kLevels)
      if (level.available() && (!*wanted || strcmp(wanted, level.kernels->name) == 0))
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
