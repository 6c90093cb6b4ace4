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

struct Shape {
  int64_t B, T, H, N;
};

// The shape, after checking that r is [B, T, H, N] of a float dtype with a fitting N.
Shape check_r(const DLTensor* r);

// A [B, T, H, N] tensor of one of two dtypes (the same one twice where only one is allowed).
Tokens tokens(const char* name, const DLTensor* x, Shape shape, DType dtype, DType or_dtype);

// A [H, N] tensor.
Heads heads(const char* name, const DLTensor* x, Shape shape, DType dtype, DType or_dtype);

// The shape [B, T, H = 1, N = D] of a [B, T, D] tensor of a float dtype, of any width D.
Shape check_channels(const char* name, const DLTensor* x);

// A [B, T, D] tensor, a [D] vector and a [B, 3, D] state of such a shape.
Tokens channel_tokens(const char* name, const DLTensor* x, Shape shape, DType dtype);
Heads channel_vector(const char* name, const DLTensor* x, Shape shape, DType dtype, DType or_dtype);
States channel_states(const char* name, const DLTensor* x, Shape shape, DType dtype);

// A [rows, columns] matrix, as one token of each of `rows` batch rows; -1 takes any number.
Tokens matrix(const char* name, const DLTensor* x, int64_t rows, int64_t columns, DType dtype);

// The values of a dense tensor of this shape, in front of which it may have dimensions of 1; and
// the size of one of its dimensions, -1 for the last.
const char* parameter(const char* name, const DLTensor* x, std::initializer_list<int64_t> shape,
                      DType dtype);
int64_t size_of(const char* name, const DLTensor* x, int dim);

// A [rows, H, N, N] tensor; rows = -1 takes any number.
States states(const char* name, const DLTensor* x, int64_t rows, Shape shape, DType dtype,
              DType or_dtype);

// Refuses a tensor two elements of which share memory: the kernels would race to write it.
void check_writable(const char* name, const DLTensor* x);

// Refuses a written tensor that shares memory with an input, as far as that is easy to tell: where
// both are dense. (Interleaved views of one buffer are not, and are fine.)
void check_apart(const char* name, const DLTensor* x, const char* input_name,
                 const DLTensor* input);

DType dtype_of(const char* name, const DLTensor* x);

// The state's dtype, and the accumulator's, for inputs of this one.
inline DType state_dtype(DType inputs) { return inputs == DType::f64 ? DType::f64 : DType::f32; }

enum class StateUse { none, read, update };

// The sequences of a call: batch rows, or the pieces of cu_seqlens; with the rows of `rows` states
// they start from, and (update) also end in. For StateUse::read sequence m ends in row m.
std::vector<Sequence> sequences(Shape shape, const DLTensor* state_map, const DLTensor* cu_seqlens,
                                StateUse use, int64_t rows);

}  // namespace rwkv6
