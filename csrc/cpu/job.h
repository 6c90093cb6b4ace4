// What a CPU kernel is asked to do, in raw pointers and strides. The checks are behind us.
#pragma once

#include "views.h"

namespace rwkv6 {

// Tokens [begin, begin + length) of batch row b, and where their state comes from and goes to.
struct Sequence {
  int64_t b, begin, length;
  int64_t initial;  // row of the initial states, -1: zeros
  int64_t final;    // row of the final states, -1: a padding row, y is zero
};

// The walk through the sequences. Its work units are (sequence, head, part of the value columns),
// all independent.
struct ForwardJob {
  const Sequence* sequences;
  int64_t num_sequences, H, N;
  int64_t parts;  // the N value columns are cut into this many parts
  Tokens r, k, v, w, y;
  Heads u;
  States initial;  // of the accumulator's dtype or r's
  States final;    // of the accumulator's dtype; may be initial itself

  int64_t units() const { return num_sequences * H * parts; }
};

// The gradients. Its work units are (sequence, head, part of the value columns), all independent;
// each part contributes a term to the gradients of r, k, w and u.
struct BackwardJob {
  const Sequence* sequences;
  int64_t num_sequences, H, N;
  int64_t parts;  // the N value columns are cut into this many parts
  Tokens grad_y, r, k, v, w;
  Heads u;
  States initial, grad_final;  // of the accumulator's dtype; initial also of r's
  Tokens grad_v;
  Tokens grad_r, grad_k,
      grad_w;  // a part writes its own, `part_stride` elements from the one before
  int64_t part_stride;
  void* grad_u;         // [num_sequences, parts, H, N] of the accumulator's dtype
  States grad_initial;  // per sequence; absent: not wanted

  int64_t units() const { return num_sequences * H * parts; }
};

// Sums what several computed, in their order: out[s] is the sum of the parts of members[first[s]]
// to members[first[s + 1]]. Its work units are (s, head).
struct SumJob {
  int64_t S, H, rows, N;
  const int64_t *first, *members;
  const void* parts;  // [members, H, rows, N] of the accumulator's dtype
  States out;         // [S, H, rows, N]

  int64_t units() const { return S * H; }
};

// One walk of RWKV-4's operator over [B, T, D], forward or back. Its channels are independent; its
// work units are (batch row, part of the channels). A state is [B, 3, D]: a, b, p as rows
// ("heads").
struct Wkv4Job {
  int64_t B, T, D;
  int64_t parts;  // the D channels are cut into this many parts
  Tokens k, v;
  Heads w, u;                       // [D]
  States initial;                   // absent: nothing seen yet
  Tokens y;                         // forward
  States final;                     // forward; may be initial itself
  Tokens grad_y, grad_k, grad_v;    // backward, as the rest
  States grad_final, grad_initial;  // may be absent
  void *grad_w, *grad_u;            // [B, D] of the accumulator's dtype, per batch row

  int64_t units() const { return B * parts; }
};

// y = x weight^T for a few rows of x, where reading the weight is what takes the time. Its work
// units are blocks of kMatvecRows rows of the weight.
constexpr int64_t kMatvecRows = 32;
struct MatvecJob {
  int64_t M, N, K;
  Tokens x, weight, y;  // [M, K], [N, K], [M, N], all of one dtype; rows are batch rows

  int64_t units() const { return (N + kMatvecRows - 1) / kMatvecRows; }
};

// One token of each of M sequences through one layer of RWKV-6. All parameters are dense and of one
// dtype; D = H * N channels, F hidden ones.
struct LayerJob {
  // Runs body(data, begin, end) over [0, n) on several threads; nullptr: on this one.
  void (*parallel_for)(void* pool, int64_t n, void (*body)(void*, int64_t, int64_t), void* data);
  void* pool;
  const Sequence* sequences;  // M of them, one token each
  int64_t M, H, N, D, F;
  int64_t mix_rank, decay_rank;
  double ln_eps, ln_x_eps;
  DType dtype;                                                // of parameters, x, shifts and y
  Tokens x, att_shift, ffn_shift, y;                          // [M, D]; the shifts are updated
  States wkv;                                                 // [M, H, N, N], updated
  const char *ln1_weight, *ln1_bias;                          // [D]
  const char *maa_x, *maa_w, *maa_k, *maa_v, *maa_r, *maa_g;  // [D]
  const char *maa_w1, *maa_w2;                                // [D, 5, mix_rank], [5, mix_rank, D]
  const char *time_decay, *decay_w1, *decay_w2;          // [D], [D, decay_rank], [decay_rank, D]
  const char* time_faaaa;                                // [H, N]
  const char *receptance, *key, *value, *gate, *output;  // [D, D]
  const char *ln_x_weight, *ln_x_bias;                   // [D]
  const char *ln2_weight, *ln2_bias;                     // [D]
  const char *ffn_maa_k, *ffn_maa_r;                     // [D]
  const char *ffn_key, *ffn_receptance, *ffn_value;      // [F, D], [D, D], [D, F]
};

// The kernels of one instruction set and one accumulator dtype; each computes the work units
// [begin, end) and may throw std::bad_alloc.
struct KernelsOf {
  int64_t columns;  // a part of fewer columns than this wastes registers
  void (*forward)(const ForwardJob&, int64_t begin, int64_t end);
  void (*backward)(const BackwardJob&, int64_t begin, int64_t end);
  void (*sum)(const SumJob&, int64_t begin, int64_t end);
  void (*wkv4_forward)(const Wkv4Job&, int64_t begin, int64_t end);
  void (*wkv4_backward)(const Wkv4Job&, int64_t begin, int64_t end);
  void (*matvec)(const MatvecJob&, int64_t begin, int64_t end);
  void (*layer)(const LayerJob&);  // the whole of it; cuts its work itself
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
