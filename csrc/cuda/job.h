// What the CUDA kernels are asked to do. Everything pointed to is memory of one device; nothing of
// it is read on the host. The checks that need no values are behind us.
#pragma once

#include "views.h"

namespace rwkv6::cuda {

// The sequences of a call: batch rows, or the pieces of cu_seqlens. See span.cuh.
struct Sequences {
  int64_t count;   // B, or M with cu_seqlens
  int64_t tokens;  // T, of one batch row
  int64_t states;  // S, the rows of the tensor that sequences start from; 0: they start from zeros
  Indices state_map;   // [count]; absent: sequence m starts from row m, or from row 0 if S is 1
  Indices cu_seqlens;  // [count + 1], or absent
  bool in_place;  // final states go where the initial ones came from, negative entries of state_map
                  // are padding rows
  // Set where cu_seqlens does not rise from 0 to T. The launch fills it in, with cu_seqlens only.
  const int* bad_cu_seqlens;
};

struct ForwardJob {
  Sequences sequences;
  int64_t H, N;
  Tokens r, k, v, w, y;
  Heads u;
  States initial;  // [S, H, N, N] of the accumulator's dtype or r's; absent: zeros
  States final;    // [count, H, N, N] of the accumulator's dtype; in place: initial itself
};

struct BackwardJob {
  Sequences sequences;
  int64_t H, N;
  Tokens grad_y, r, k, v, w;  // grad_y may be absent
  Heads u;
  States initial;     // as above
  States grad_final;  // [count, H, N, N] of the accumulator's dtype; absent: zeros
  Tokens grad_r, grad_k, grad_v, grad_w;
  Heads grad_u;
  States grad_initial;  // [count, H, N, N] of the accumulator's dtype, per sequence; absent: not
                        // wanted
};

}  // namespace rwkv6::cuda
