// Which segment of which sequence a block walks.
#pragma once

#include "cuda/segments.h"
#include "cuda/span.cuh"

namespace rwkv6::cuda {

// The first segment of sequence m, and with m = sequences.count how many there are.
__device__ inline int64_t first_segment(const Sequences& sequences, const Segments& segments,
                                        int64_t m) {
  if (segments.count == sequences.count) return m;
  if (!sequences.cu_seqlens.data) return segments.count / sequences.count * m;
  return packed_begin(sequences, m) / segments.length + m;
}
// The last sequence that begins with this segment or before.
__device__ inline int64_t sequence_of(const Sequences& sequences, const Segments& segments,
                                      int64_t segment) {
  if (segments.count == sequences.count) return segment;
  if (!sequences.cu_seqlens.data) return segment / (segments.count / sequences.count);
  int64_t low = 0, high = sequences.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first_segment(sequences, segments, middle) <= segment ? low : high) = middle;
  }
  return low;
}

// One of a sequence's segments, with one head.
struct Place {
  int64_t index;        // of segment and head, among all
  int64_t m, h;         // sequence, head
  int64_t segment;      // in the sequence
  Span span;            // the sequence
  int64_t first, last;  // the segment's tokens, in the sequence
  bool cut;             // the sequence has more than one segment

  Place() = default;
  __device__ Place(const Sequences& sequences, const Segments& segments, int64_t H,
                   int64_t index = blockIdx.x)
      : index(index), h(index % H) {
    m = sequence_of(sequences, segments, index / H);
    segment = index / H - first_segment(sequences, segments, m);
    span = span_of(sequences, m);
    first = min(segment * segments.length, span.length);
    last = min(first + segments.length, span.length);
    cut = span.length > segments.length;
  }
  // Packed sequences may have taken fewer segments than there is room for.
  __device__ bool is_left_over() const { return segment > 0 && first == last; }
  // The segment of the sequence's last token, which the final state belongs to.
  __device__ bool is_end() const { return last == span.length && !is_left_over(); }
  // How many of the tokens from `token` on are the chunk's.
  __device__ int tokens(int64_t token) const { return int(min(last - token, int64_t(kChunk))); }
  // The same of those with a decay that matters to a gradient: without one of the final state that
  // of the sequence's last token does not, be it NaN.
  __device__ int decaying(int64_t token, bool has_grad_final) const {
    return min(tokens(token), int(span.length - token) - !has_grad_final);
  }
};

}  // namespace rwkv6::cuda
