// From DLTensors to the kernels' views: every check of the C interface is here.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "rwkv6.h"

namespace rwkv6 {

static_assert(kMaxHeadSize == RWKV6_MAX_HEAD_SIZE, "the kernels' scratch is sized by it");

// A caller's mistake; its text is the message the entry point returns.
struct ArgumentError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a tensor is. Memory that is pinned for a GPU counts as the CPU's.
struct Device {
  bool cuda = false;
  int index = 0;

  bool operator==(const Device&) const = default;
};

// The sizes, and the device, that all tensors of a call share.
struct Sizes {
  int64_t B, T, H, N;
  Device device;
};

// A struct of arguments, which must be there.
template <class T>
const T& required(const char* name, const T* x) {
  if (!x) throw ArgumentError(std::string(name) + ": required, got NULL");
  return *x;
}

DType dtype_of(const char* name, const DLTensor* x);

// The size of one dimension, -1 for the last.
int64_t dimension_size(const char* name, const DLTensor* x, int dim);

// The sizes, after checking that a call's first input is [B, T, H, N] of a float dtype with a
// fitting N.
Sizes check_first(const char* name, const DLTensor* x);

// A [B, T, H, N] tensor of one of two dtypes (the same one twice where only one is allowed).
Tokens tokens(const char* name, const DLTensor* x, const Sizes& sizes, DType dtype, DType or_dtype);

// A [H, N] or [B, H, N] tensor.
Heads heads(const char* name, const DLTensor* x, const Sizes& sizes, DType dtype, DType or_dtype);

// A [rows, H, N, N] tensor; rows = -1 takes any number.
States states(const char* name, const DLTensor* x, int64_t rows, const Sizes& sizes, DType dtype,
              DType or_dtype);

// The sequences of a call that starts from the rows of `state` (NULL: from zeros), after all checks
// that need no values. in_place: it also ends in these rows, and `state` is its argument's name.
Sequences check_sequences(const Sizes& sizes, const DLTensor* state_map, const DLTensor* cu_seqlens,
                          const DLTensor* state, bool in_place);

// Each of the sequences, after checking the values of state_map and cu_seqlens, which are on the
// CPU. Sequence m ends in row m, or in place where it started.
std::vector<Sequence> read_sequences(const Sequences& sequences);

// The sizes B, T, H = 1, N = D of a [B, T, D] tensor of a float dtype, of any width D, on the CPU.
Sizes check_channels(const char* name, const DLTensor* x);

// A [B, T, D] tensor, a [D] vector and a [B, 3, D] state of such sizes.
Tokens channel_tokens(const char* name, const DLTensor* x, const Sizes& sizes, DType dtype);
Heads channel_vector(const char* name, const DLTensor* x, const Sizes& sizes, DType dtype,
                     DType or_dtype);
States channel_states(const char* name, const DLTensor* x, const Sizes& sizes, DType dtype);

// A [rows, columns] matrix on the CPU, as one token of each of `rows` batch rows; -1 accepts any
// number.
Tokens matrix(const char* name, const DLTensor* x, int64_t rows, int64_t columns, DType dtype);

// A [rows, columns] matrix of int8 on the CPU, and the numbers that its rows are multiplied by: a
// dense [rows] vector of f32.
Tokens int8_matrix(const char* name, const DLTensor* x, int64_t rows, int64_t columns);
const float* row_scales(const char* name, const DLTensor* x, int64_t rows);

// The values of a dense tensor on the CPU, of this shape or with further dimensions of 1 in front.
// i8 is a dtype here as well.
const char* parameter(const char* name, const DLTensor* x, std::initializer_list<int64_t> shape,
                      DType dtype);

// Refuses an output of which two elements share memory: threads would race to write it.
void check_writable(const char* name, const DLTensor* x);

// Refuses an output that shares memory with an input. Interleaved views of one buffer share none
// and are accepted.
void check_apart(const char* name, const DLTensor* x, const char* input_name,
                 const DLTensor* input);

}  // namespace rwkv6
