// Sums over the lanes of a warp.
#pragma once

namespace rwkv6::cuda {

constexpr unsigned kAllLanes = ~0u;

// Butterfly reduction of n values over the lane-index bits `low` to `high` (powers of two): sums
// over the lanes whose indices differ in these bits only. At each step a lane sends half of its
// values to its partner and receives the partner's share of the other half. In the end a lane holds
// the sums of the values [first, first + held), with held = n / (2 high / low), at least 1; when
// only one value is left, both partners get the same sum. Returns first.
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
