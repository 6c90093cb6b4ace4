// Which instruction set this process computes with.
#pragma once

#include <string>

#include "kernels.h"

namespace rwkv6 {

// The best the CPU has, or the one that the environment variable RWKV6_CPU_ISA names; nullptr if it
// names one that is unknown or that the CPU lacks. Decided once.
const Kernels* select_kernels();

// Why select_kernels() is nullptr, for the caller to read.
std::string no_kernels_message();

}  // namespace rwkv6
