// What the kernels of WKV6 are asked to do, on the CPU as on a GPU: raw pointers and strides, after
// all checks that need no values.
#pragma once

#include "rwkv6.h"
#include "views.h"

namespace rwkv6 {

// The checkpoints of a sequence are the states before its tokens 128, 256, ...: this many apart.
constexpr int64_t kCheckpointTokens = RWKV6_CHECKPOINT_TOKENS;

// The sequences of a call: batch rows, or the pieces of cu_seqlens.
struct Sequences {
  int64_t count;   // B, or M with cu_seqlens
  int64_t tokens;  // T, of one batch row
  int64_t states;  // S, the rows of the tensor that sequences start from; 0: they start from zeros
  Indices state_map;   // [count]; absent: sequence m starts from row m, or from row 0 if S is 1
  Indices cu_seqlens;  // [count + 1], or absent
  bool in_place;  // final states go where the initial ones came from, negative entries of state_map
                  // are padding rows
  // On a GPU, with cu_seqlens: points to 1 if they do not rise from 0 to T, otherwise to 0. The
  // launch fills it in.
  const int* bad_cu_seqlens;

  // Checkpoints lie where their tokens do: two of them are never less than kCheckpointTokens apart,
  // so the rows are distinct, and how many there are follows from T alone.
  RWKV6_HOST_DEVICE int64_t checkpoints_of_row() const { return tokens / kCheckpointTokens; }
  RWKV6_HOST_DEVICE int64_t checkpoints() const {
    return (cu_seqlens.data ? 1 : count) * checkpoints_of_row();
  }
  // The row of the state before `token` of a sequence that begins at token `begin` of batch row b.
  RWKV6_HOST_DEVICE int64_t checkpoint(int64_t b, int64_t begin, int64_t token) const {
    return b * checkpoints_of_row() + (begin + token) / kCheckpointTokens - 1;
  }
};

// The inputs of a call, forward or backward.
struct WkvInputs {
  Sequences sequences;
  int64_t H, N;
  Tokens r, k, v, w;  // r and u: absent where a forward's y is
  Heads u;
  States initial;  // [S, H, N, N] of the accumulator's dtype or r's; absent: zeros
};

struct ForwardJob : WkvInputs {
  Tokens y;            // absent: only the final state is wanted
  States final;        // [count, H, N, N] of the accumulator's dtype; in place: initial itself
  States checkpoints;  // at least [checkpoints(), H, N, N] of the accumulator's dtype, or absent
};

struct BackwardJob : WkvInputs {
  States checkpoints;  // as the forward kept them; absent: they are recomputed
  Tokens grad_y;       // absent: y plays no part
  States grad_final;   // [count, H, N, N] of the accumulator's dtype; absent: zeros
  Tokens grad_r, grad_k, grad_v, grad_w;
  Heads grad_u;
  // [S, H, N, N] of initial's dtype; absent if initial is. The kernels are given one of
  // [count, H, N, N] of the accumulator's dtype, which is summed where sequences share a state.
  States grad_initial;
};

}  // namespace rwkv6
