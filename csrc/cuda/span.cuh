// Which tokens a block walks over and where their state comes from and goes to: looked up on the
// device, because reading state_map or cu_seqlens on the host would wait for the GPU.
#pragma once

#include "job.h"

namespace rwkv6::cuda {

struct Span {
  int64_t b, begin, length;  // tokens [begin, begin + length) of batch row b
  int64_t initial;           // row of the initial states, -1: zeros
  int64_t final;             // row of the final states, -1: none
  bool padding;              // in place: y is zero, no state is touched
  bool valid;                // otherwise y, gradients and the final state are NaN
};

// Where a packed sequence begins. If cu_seqlens is wrong all tokens are somebody's, so that all of y
// is written.
__device__ inline int64_t packed_begin(const Sequences& s, int64_t m) {
  return *s.bad_cu_seqlens ? s.tokens * m / s.count : s.cu_seqlens[m];
}

__device__ inline Span span_of(const Sequences& s, int64_t m) {
  Span span = {m, 0, s.tokens, s.states == 1 ? 0 : m, m, false, true};
  if (s.cu_seqlens.data) {
    span.b = 0;
    span.valid = !*s.bad_cu_seqlens;
    span.begin = packed_begin(s, m);
    span.length = packed_begin(s, m + 1) - span.begin;
  }
  if (s.state_map.data) {
    span.initial = s.state_map[m];
    span.padding = s.in_place && span.initial < 0;
    if (!span.padding && (span.initial < 0 || span.initial >= s.states)) span.valid = false;
    if (!span.valid || span.padding) span.initial = -1;
  } else if (s.states == 0) {
    span.initial = -1;
  }
  if (s.in_place) span.final = span.initial;
  return span;
}

}  // namespace rwkv6::cuda
