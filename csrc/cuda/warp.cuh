// Sums over the lanes of a warp.
#pragma once

namespace rwkv6::cuda {

constexpr unsigned kAllLanes = ~0u;

// Adds up n values over all lanes that agree outside of the bits [low, high] of their number, which
// are powers of two. Every step hands half of the values still held to the lane across and takes
// over its other half, so that in the end a lane holds values [first, first + held); once one is
// left, all lanes across get the same sum. Returns first; held = n / (2 high / low), at least 1.
template <int n, int low, int high, class T>
__device__ int sum_lanes(T (&x)[n], int lane) {
  int first = 0;
  int held = n;
#pragma unroll
  for (int bit = high; bit >= low; bit /= 2) {
    if (held > 1) {
      held /= 2;
      const bool upper = lane & bit;
      first += upper ? held : 0;
#pragma unroll
      for (int i = 0; i < n / 2; i++)
        if (i < held) {
          const T sent = upper ? x[i] : x[i + held];
          const T kept = upper ? x[i + held] : x[i];
          x[i] = kept + __shfl_xor_sync(kAllLanes, sent, bit);
        }
    } else {
      x[0] += __shfl_xor_sync(kAllLanes, x[0], bit);
    }
  }
  return first;
}

}  // namespace rwkv6::cuda
