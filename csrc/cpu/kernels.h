// The CPU's kernels and what each is given: raw pointers and strides, after all checks.
#pragma once

#include "job.h"

namespace rwkv6 {

// Tokens [begin, begin + length) of batch row b, and where their state comes from and goes to.
struct Sequence {
  int64_t b, begin, length;
  int64_t initial;  // row of the initial states, -1: zeros
  int64_t final;    // row of the final states, -1: a padding row, y is zero
};

// A forward cut into work units: (sequence, head, part of the value columns), all independent.
struct ForwardWork : ForwardJob {
  const Sequence* list;  // sequences.count of them
  int64_t parts;         // the N value columns are cut into this many parts

  int64_t units() const { return sequences.count * H * parts; }
};

// A backward cut into the same units. A part contributes a term to the gradients of r, k, w and u:
// it writes its own grad_r, grad_k and grad_w, `part_stride` elements from those of the part
// before.
struct BackwardWork : BackwardJob {
  const Sequence* list;
  int64_t parts;
  int64_t part_stride;
  void* grad_u_terms;  // [sequences.count, parts, H, N] of the accumulator's dtype

  int64_t units() const { return sequences.count * H * parts; }
};

// Sums of matrices in a fixed order: out[s] is terms[members[first[s]]] + ... +
// terms[members[first[s + 1] - 1]]. Its work units are (s, head).
struct SumJob {
  int64_t S, H, rows, N;
  const int64_t *first, *members;
  const void* terms;  // [all members, H, rows, N] of the accumulator's dtype
  States out;         // [S, H, rows, N]

  int64_t units() const { return S * H; }
};

// RWKV-4's operator over [B, T, D], forward or backward. Channels are independent; the work units
// are (batch row, part of the channels). A state [B, 3, D] has the rows a, b and p, as "heads".
struct Wkv4Job {
  int64_t B, T, D;
  int64_t parts;  // the D channels are cut into this many parts
  Tokens k, v;
  Heads w, u;                         // [D]
  States initial;                     // absent: nothing seen yet
  Tokens y;                           // forward
  States final;                       // forward; may be initial itself
  Tokens grad_y, grad_k, grad_v;      // backward, as everything below
  States grad_final, grad_initial;    // may be absent
  void *grad_w_terms, *grad_u_terms;  // [B, D] of the accumulator's dtype: each batch row's

  int64_t units() const { return B * parts; }
};

// y = x weight^T for a few rows of x, where reading the weight is what takes the time. The work
// units are blocks of kMatvecRows rows of the weight.
constexpr int64_t kMatvecRows = 32;
struct MatvecJob {
  int64_t M, N, K;
  Tokens x, weight, y;  // [M, K], [N, K], [M, N]; all of one dtype, or weight of int8
  const float* scale;   // [N]: row n of an int8 weight stands for scale[n] times its numbers

  int64_t units() const { return (N + kMatvecRows - 1) / kMatvecRows; }
};

// One token of each of M sequences through one layer of RWKV-6. All parameters are dense and of one
// dtype, but for the matrices where those are int8; D = H * N channels, F of them in the channel
// mixing.
struct LayerJob {
  // Runs body(data, begin, end) over [0, n) on several threads; nullptr: on this one.
  void (*parallel_for)(void* pool, int64_t n, void (*body)(void*, int64_t, int64_t), void* data);
  void* pool;
  const Sequence* list;  // M sequences of one token
  int64_t M, H, N, D, F;
  int64_t mix_rank, decay_rank;
  double ln_eps, ln_x_eps;
  DType dtype;                        // of parameters, x, shifts and y
  Tokens x, att_shift, ffn_shift, y;  // [M, D]; the shifts are updated
  States wkv;                         // [M, H, N, N], updated
#define RWKV6_LAYER_PARAMETER(field, name, ...) const char* field;
#define RWKV6_LAYER_MATRIX(field, name, rows, columns) \
  const char* field;                                   \
  const float* field##_scale; /* nullptr where the matrix has the dtype of the others */
#include "include/rwkv6_layer_parameters.inc"
};

// The kernels of one instruction set and one accumulator dtype; each computes the work units
// [begin, end) and may throw std::bad_alloc.
struct KernelsOf {
  int64_t columns;  // a part of fewer columns than this wastes registers
  void (*forward)(const ForwardWork&, int64_t begin, int64_t end);
  void (*backward)(const BackwardWork&, int64_t begin, int64_t end);
  void (*sum)(const SumJob&, int64_t begin, int64_t end);
  void (*wkv4_forward)(const Wkv4Job&, int64_t begin, int64_t end);
  void (*wkv4_backward)(const Wkv4Job&, int64_t begin, int64_t end);
  void (*matvec)(const MatvecJob&, int64_t begin, int64_t end);
  void (*layer)(const LayerJob&);  // all of it: its stages cut their work themselves
};
struct Kernels {
  const char* name;
  KernelsOf f32;  // for f32, bf16 and f16 inputs
  KernelsOf f64;
};

// The columns [first, last) of part `part`, for N columns in `parts` parts.
struct Columns {
  int64_t first, last;
};
inline Columns columns_of(int64_t part, int64_t parts, int64_t N, int64_t lanes) {
  const int64_t vectors = (N + lanes - 1) / lanes;
  const int64_t last = vectors * (part + 1) / parts * lanes;
  return {vectors * part / parts * lanes, last < N ? last : N};
}

}  // namespace rwkv6
