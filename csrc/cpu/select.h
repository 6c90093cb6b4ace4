// Which instruction set this process computes with.
#pragma once

#include <string>

#include "kernels.h"

namespace rwkv6 {

// The kernels of the best instruction set of this CPU, or of the one that the environment variable
// RWKV6_CPU_ISA names; nullptr if that is unknown or not available. Decided at the first call.
const Kernels* select_kernels();

// Why select_kernels() is nullptr, as a message for the user.
std::string no_kernels_message();

}  // namespace rwkv6
