// Tests of the kernel library through its C interface alone (csrc/include/rwkv6.h), in C++, so that
// they run wherever a compiler reaches: `make test-neon`, `make test-clang`, and from pytest. With
// ONLY_SIZES defined it has the tests of odd sizes alone: those that a sanitizer watches in every
// test run.
#include "check.h"
#include "rwkv6.h"

int main() {
  setvbuf(stdout, nullptr, _IOLBF, 0);  // a crash loses no line
  const char* isa = rwkv6_cpu_isa();
  if (!isa) {
    printf("RWKV6_CPU_ISA names an instruction set that this CPU lacks\n");
    return 2;
  }
  printf("instruction set: %s\n", isa);
  Report report;
  test_sizes(report);
  report.passed_by("sizes");
#ifndef ONLY_SIZES
  test_promises(report);
  report.passed_by("promises");
  test_accuracy(report);
#endif
  return report.finish();
}
