// Tests of the kernel library through its C interface alone (csrc/include/rwkv6.h), in C++, so that
// they run wherever a compiler reaches: `make test-neon`, `make test-clang`, and from pytest. With
// the argument "sizes" only the tests of odd sizes run: those that a sanitizer watches in every
// test run.
#include "check.h"
#include "rwkv6.h"

int main(int argc, char** argv) {
  const bool only_sizes = argc == 2 && std::string(argv[1]) == "sizes";
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
  if (only_sizes) return report.finish();
  test_promises(report);
  report.passed_by("promises");
  test_accuracy(report);
  return report.finish();
}
