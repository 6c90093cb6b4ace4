// Long sequences of few heads are cut into segments, which blocks walk at the same time: a pass
// over the state alone finds what each segment adds, a scan from segment to segment where each
// starts.
#pragma once

#include <algorithm>

#include "cuda/launch.h"

namespace rwkv6::cuda {

constexpr int kChunk = 16;  // tokens
constexpr int kGroup = 4;   // chunks between two checkpoints of the backward

struct Segments {
  int64_t count;   // in each sequence
  int64_t length;  // in tokens, whole groups of chunks
};

// What a walk in segments costs, in units of the time in which a block that has a multiprocessor for
// itself takes one token. Fitted to times of every segment length at fifteen shapes on an H200
// (docs/cuda.md).
struct Costs {
  double begin;      // what a block does before its first token
  double crowding;   // by how much of itself a token takes longer in full multiprocessors
  double walk;       // a token that is also walked for its segment's start, to one that is not
  double scan;       // to launch the walk and the scan
  double scan_each;  // the scan, for each segment
};

// The segments that cost least, for a kernel of which a multiprocessor has room for blocks_each
// blocks. RWKV6_CUDA_SEGMENT names a length instead, for tests. Of a packed batch only the sum of
// the lengths is known here: it is taken for one long sequence if its sequences alone leave
// multiprocessors empty, and is not cut otherwise.
Segments segments_of(const Launch& launch, const Sequences& sequences, int64_t H,
                     int64_t blocks_each, const Costs& costs);

// The walk of a state alone, S <- d S + x v: of the state itself with x = k, or, backwards, of its
// gradient with x = r and v = grad_y.
struct Walk {
  Sequences sequences;
  int64_t H, N;
  Tokens x, v, w;
  States from;  // the first state, by span.initial; backwards the last, by sequence
  bool reverse;
};

// The state at each segment's beginning (backwards: end), [sequence][head][segment][N][N].
const float* segment_starts(const Launch& launch, const Walk& walk, const Segments& segments);

// The state before every kGroup-th chunk: [group_of(...)][head][N][N].
const float* checkpoints(const Launch& launch, const Walk& walk, const Segments& segments,
                         const float* starts);

// The groups of all sequences, one after another; `position` is that of the sequence's first token
// in the batch, `token` is in the sequence.
RWKV6_HOST_DEVICE inline int64_t group_of(int64_t position, int64_t m, int64_t token) {
  constexpr int64_t kTokens = kChunk * kGroup;
  return position / kTokens + m + token / kTokens;
}

}  // namespace rwkv6::cuda
