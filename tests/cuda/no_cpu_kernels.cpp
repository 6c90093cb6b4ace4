// Takes the place of csrc/cpu in the library that the tests of the CUDA kernels build.
#include "cpu/select.h"

namespace rwkv6 {

const Kernels* select_kernels() { return nullptr; }

std::string no_kernels_message() { return "built without kernels for the CPU"; }

}  // namespace rwkv6
