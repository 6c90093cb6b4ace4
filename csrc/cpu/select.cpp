#include "select.h"

#include <cstdlib>
#include <cstring>

namespace rwkv6 {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

const Kernels* select_kernels() {
  static const Kernels* const chosen = []() -> const Kernels* {
    const char* forced = getenv("RWKV6_CPU_ISA");
    const auto wanted = [&](const Kernels& kernels) {
      return !forced || !*forced || strcmp(forced, kernels.name) == 0;
    };
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && wanted(avx512::kernels)) return &avx512::kernels;
    if (has_avx2 && wanted(avx2::kernels)) return &avx2::kernels;
#endif
    return wanted(baseline::kernels) ? &baseline::kernels : nullptr;
  }();
  return chosen;
}

}  // namespace rwkv6
