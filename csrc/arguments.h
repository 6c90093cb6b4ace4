// From DLTensors to the kernels' views: every check of the C interface is here.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/job.h"
#include "rwkv6.h"

namespace rwkv6 {

static_assert(kMaxHeadSize == RWKV6_MAX_HEAD_SIZE, "the kernels' scratch is sized by it");

// A caller's mistake; its text is the message the entry point returns.
struct ArgumentError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a tensor is; memory that is pinned for a GPU is the CPU's.
struct Device {
  bool cuda = false;
  int index = 0;

  bool operator==(const Device&) const = default;
};

// The sizes, and the device, that all tensors of a call share.
struct Shape {
  int64_t B, T, H, N;
  Device device;
};

// The shape, after checking that r is [B, T, H, N] of a float dtype with a fitting N.
Shape check_r(const DLTensor* r);

// A [B, T, H, N] tensor of one of two dtypes (the same one twice where only one is allowed).
Tokens tokens(const char* name, const DLTensor* x, Shape shape, DType dtype, DType or_dtype);

// A [H, N] tensor; on a GPU also [B, H, N].
Heads heads(const char* name, const DLTensor* x, Shape shape, DType dtype, DType or_dtype);

// The shape [B, T, H = 1, N = D] of a [B, T, D] tensor of a float dtype, of any width D, on the
// CPU.
Shape check_channels(const char* name, const DLTensor* x);

// A [B, T, D] tensor, a [D] vector and a [B, 3, D] state of such a shape.
Tokens channel_tokens(const char* name, const DLTensor* x, Shape shape, DType dtype);
Heads channel_vector(const char* name, const DLTensor* x, Shape shape, DType dtype, DType or_dtype);
States channel_states(const char* name, const DLTensor* x, Shape shape, DType dtype);

// A [rows, columns] matrix on the CPU, as one token of each of `rows` batch rows; -1 takes any
// number.
Tokens matrix(const char* name, const DLTensor* x, int64_t rows, int64_t columns, DType dtype);

// The values of a dense tensor of this shape on the CPU, in front of which it may have dimensions
// of 1; and the size of one of its dimensions, -1 for the last.
const char* parameter(const char* name, const DLTensor* x, std::initializer_list<int64_t> shape,
                      DType dtype);
int64_t size_of(const char* name, const DLTensor* x, int dim);

// A [rows, H, N, N] tensor; rows = -1 takes any number.
States states(const char* name, const DLTensor* x, int64_t rows, Shape shape, DType dtype,
              DType or_dtype);

// Refuses a tensor two elements of which share memory: the kernels would race to write it.
void check_writable(const char* name, const DLTensor* x);

// Refuses a written tensor that shares memory with an input. Interleaved views of one buffer share
// none and are fine.
void check_apart(const char* name, const DLTensor* x, const char* input_name,
                 const DLTensor* input);

DType dtype_of(const char* name, const DLTensor* x);

enum class StateUse { none, read, update };

// Which sequences a call walks through: batch rows, or the pieces of cu_seqlens. The constructor
// checks all that can be told without looking at values.
struct Walk {
  Shape shape;
  const DLTensor *state_map, *cu_seqlens;
  StateUse use;
  int64_t states;  // S, the rows that they start from
  int64_t count;   // B or M

  Walk(Shape shape, const DLTensor* state_map, const DLTensor* cu_seqlens, StateUse use,
       const DLTensor* state);

  // On the CPU: each sequence, after checking the values. For StateUse::read sequence m ends in
  // row m, for StateUse::update where it started.
  std::vector<Sequence> sequences() const;
};

// An index tensor as it lies in memory; absent for NULL.
Indices indices(const DLTensor* x);

}  // namespace rwkv6
