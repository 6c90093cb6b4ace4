// .shared .align 16 .b8 name[1024], .param .u64 name, .global .f32 name[2] = {...}
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ptxcpu {

struct Declaration {
  explicit Declaration(const std::string& text);
  std::string name;
  int width = 0;  // bytes of an element
  uint64_t elements = 1;
  uint32_t alignment = 1;
  std::vector<std::string> values;
  uint64_t size() const { return width * elements; }
};

}  // namespace ptxcpu
