// Long sequences of few heads are cut into segments, which blocks walk at the same time: a pass
// over the state alone finds what each segment adds, a scan from segment to segment where each
// starts. The pass has a kernel for each family, the rest is the same.
#pragma once

#include <algorithm>

#include "cuda/launch.h"

namespace rwkv6::cuda {

constexpr int kChunk = 16;                          // tokens
constexpr int kGroup = kCheckpointTokens / kChunk;  // chunks between two checkpoints
static_assert(kCheckpointTokens % kChunk == 0);

// The segments of all sequences lie one after another; one block each and head walks them. Packed
// sequences, whose lengths only the device knows, have room for at least as many as they need; what
// is left is empty.
struct Segments {
  int64_t count;   // of all sequences
  int64_t length;  // in tokens, a multiple of SegmentCosts::multiple

  bool cuts(const Sequences& sequences) const { return count > sequences.count; }
};

// What segments of L tokens cost, fitted to measured times (on an H200 at 15 shapes, where a kernel
// says nothing else); the unit is what a token takes in a block alone on its multiprocessor. The
// recurrent kernels count warps in the place of blocks.
struct SegmentCosts {
  double sharing;    // what a token takes more with a multiprocessor full of blocks
  double start;      // of a block
  double walk;       // a token's factor where its segment's beginning has to be found first
  double scan;       // launches, and
  double segment;    // one segment in the scan from beginning to beginning
  int64_t multiple;  // tokens: whole chunks, in a backward whole groups of them
};

// Segments of the length that costs least, given how many blocks a multiprocessor has room for.
// Of packed sequences the host knows no lengths: no segment is longer than what every block would
// have if the tokens were shared evenly, unless sequences have few tokens on average, which are
// taken for short ones. RWKV6_CUDA_SEGMENT names another length, for tests.
Segments segments_of(const Launch& launch, const Sequences& sequences, int64_t H,
                     int64_t blocks_each, const SegmentCosts& costs);

// The walk of a state alone, S <- d S + x v: of the state itself with x = k, or, backwards, of its
// gradient with x = r and v = grad_y.
struct Walk {
  Family family;
  Sequences sequences;
  int64_t H, N;
  Tokens x, v, w;
  States from;  // the first state, by span.initial; backwards the last, by sequence
  bool reverse;
};

// The state at the beginning (backwards: end) of each segment of a sequence that has several,
// [segment][head][N][N]; T is double for f64. With `final`, [sequence][head][N][N] of T, that of
// each segment of all sequences, and the states behind the last ones go there.
template <class T>
const T* segment_starts(const Launch& launch, const Walk& walk, const Segments& segments,
                        const States& final = {});

// The same as States whose rows are the segments and heads (Place::index).
template <class T>
States by_place(const T* states, int64_t N) {
  return {reinterpret_cast<char*>(const_cast<T*>(states)), sizeof(T) == 8 ? DType::f64 : DType::f32,
          N * N, 0, N};
}

// For the recurrent kernels, what each segment adds to the state, ends [segment][head][N][N], and
// by what its decays change it (decay.cuh), changes [segment][head][N]; `uncut`: of sequences with
// one segment as well. Each segment and head takes some blocks, of which a multiprocessor holds
// kStateSumBlocks or what its shared memory has room for.
constexpr int kStateSumBlocks = 8;
template <class T>
int64_t state_sum_squares(int64_t N);
template <class T>
void state_sums(const Launch& launch, const Walk& walk, const Segments& segments, bool uncut,
                T* ends, T* changes);

// The checkpoints of all sequences where the forward kept none.
States checkpoints(const Launch& launch, const Walk& walk, const Segments& segments,
                   const float* starts);

}  // namespace rwkv6::cuda
