// Whether strided tensors share memory: with themselves or with one another.
#pragma once

#include <cstdint>
#include <vector>

namespace rwkv6 {

// One dimension of a tensor: `size` elements, `stride` elements (or bytes) apart.
struct Dimension {
  int64_t stride, size;
};

// A tensor's memory in bytes: the elements lie at begin + sum of index * stride over `dims`, and
// each is `element` bytes long.
struct Extent {
  int64_t begin;
  int64_t element;
  std::vector<Dimension> dims;
};

// Whether two different elements of a tensor with these dimensions share memory.
bool overlaps_itself(const std::vector<Dimension>& dims);

// Whether some byte belongs to both tensors.
bool overlap(const Extent& a, const Extent& b);

}  // namespace rwkv6
