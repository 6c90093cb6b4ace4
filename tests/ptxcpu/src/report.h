// What a launch did, as JSON.
#pragma once

#include <string>

#include "machine.h"

namespace ptxcpu {

std::string json_string(const std::string& text);
// {"statistics": {...}, "messages": [...], "instructions": {"fma.rn.f32": 12, ...}}, without the
// braces.
std::string json_fields(const Launch& launch, const Module& module);

}  // namespace ptxcpu
