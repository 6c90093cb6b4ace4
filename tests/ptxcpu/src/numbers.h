// The number formats of PTX that C++ lacks, and masks of lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace ptxcpu {

constexpr int kLanes = 32;
using Mask = uint32_t;  // one bit a lane
constexpr Mask kAllLanes = ~0u;

inline bool in(Mask mask, int lane) { return mask >> lane & 1; }
inline int count(Mask mask) { return __builtin_popcount(mask); }
inline int first(Mask mask) { return __builtin_ctz(mask); }

// f(lane) for the lanes of the mask.
template <class F>
inline void for_lanes(Mask mask, F f) {
  if (mask == kAllLanes) {
    for (int lane = 0; lane < kLanes; lane++) f(lane);
  } else {
    for (Mask left = mask; left; left &= left - 1) f(first(left));
  }
}

// A module that cannot be run: malformed, or with an instruction that is not supported.
struct PtxError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] inline void fail(const std::string& message) { throw PtxError(message); }

template <class To, class From>
inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &value, sizeof to);
  return to;
}

inline bool infinite_or_nan(uint32_t float_bits) { return (float_bits & 0x7f800000) == 0x7f800000; }

inline float from_bfloat16(uint16_t x) { return bits<float>(uint32_t(x) << 16); }

// Rounded once, to nearest even: float keeps the rest of the double as a sticky last bit.
inline uint16_t to_bfloat16(double x) {
  if (std::isnan(x)) return 0x7fff;
  float nearest = float(x);
  uint32_t u = bits<uint32_t>(nearest);
  if (nearest != x && !std::isinf(nearest)) {
    if (std::fabs(double(nearest)) > std::fabs(x)) u -= 1;
    u |= 1;
  }
  if (infinite_or_nan(u)) return u >> 16;
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

inline float from_half(uint16_t x) { return float(bits<_Float16>(x)); }
inline uint16_t to_half(double x) { return std::isnan(x) ? 0x7fff : bits<uint16_t>(_Float16(x)); }

// The next number towards zero where `rounded`, 16 bits of x, went away from it.
inline uint16_t towards_zero(uint16_t rounded, double back, double x) {
  return std::fabs(back) > std::fabs(x) ? rounded - 1 : rounded;
}

// Rounds to nearest, ties away from zero: cvt.rna.tf32.f32.
inline uint32_t to_tf32(float x) {
  uint32_t u = bits<uint32_t>(x);
  return infinite_or_nan(u) ? u : (u + 0x1000) & 0xffffe000;
}
// The tensor cores ignore the 13 low bits.
inline float as_tf32(uint32_t u) { return bits<float>(u & 0xffffe000); }

// The NaN that arithmetic of NVIDIA's makes, whatever NaN it met.
inline float canonical_nan(float x) { return x == x ? x : bits<float>(0x7fffffffu); }
inline double canonical_nan(double x) { return x; }  // of doubles a NaN keeps its bits

inline float flush_denormal(float x) {
  uint32_t u = bits<uint32_t>(x);
  return bits<float>(u & 0x7f800000 ? u : u & 0x80000000);
}
template <class T>
inline T saturate(T x) {
  return x > 0 ? (x < 1 ? x : T(1)) : T(0);  // NaN: 0
}

}  // namespace ptxcpu
