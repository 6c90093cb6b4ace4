#include "select.h"

#include <cstdlib>
#include <cstring>

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

#if defined(__x86_64__)
bool has_avx2() {
  // F16C came before AVX2; not every compiler can ask for it
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// The best first.
const Level kLevels[] = {
#if defined(__x86_64__)
    {&avx512::kernels, has_avx512},
    {&avx2::kernels, has_avx2},
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
