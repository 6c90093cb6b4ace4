// The decay of a channel, exp(-exp(w)): exactly 1 where exp(w) vanishes, 0 where it is large.
#pragma once

namespace rwkv6::cuda {

__device__ inline float exp2_approx(float x) {  // 2 ulp, no denormals
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// In base 2, two roundings of the exponent: enough beside the 11 bits of the chunked kernels.
__device__ inline float decay(float w) { return exp2_approx(-kLog2E * exp2_approx(kLog2E * w)); }

// exp(w), kept finite, so that no gradient meets 0 times infinity; its decay is 0 long before.
__device__ inline float decay_rate(float w) {
  w = w > 88 ? 88 : w;
  w = w < -104 ? -104 : w;
  constexpr float kLog2ELow = 1.92596303e-8f;
  const float x = w * kLog2E;
  const float lost = fmaf(w, kLog2E, -x) + w * kLog2ELow;  // of the exponent by rounding
  const float y = exp2_approx(x);
  return fmaf(y, lost * kLn2, y);
}
__device__ inline double decay_rate(double w) { return exp(w > 709 ? 709 : w); }

// What rounds the exponent here is small where the decay is not.
__device__ inline float decay_of_rate(float rate) { return exp2_approx(rate * -kLog2E); }
__device__ inline double decay_of_rate(double rate) { return exp(-rate); }

// d S + k v is computed as kept S + (change S + k v), which loses digits at neither end of the
// decays. From 1/2 on kept is 1, and change = d - 1 has all its digits: d itself, near 1, has few left
// for what it takes from the state, and its rounding is the same at every token. Below kept is 0, so
// that nothing is rounded to the size of a state that is forgotten, and change = d.
//
// The sign bit of change, set also where it is -0, tells which of both it is.
__device__ inline float change_of_rate(float rate) {
  const float decay = decay_of_rate(rate);
  float series = fmaf(rate, -1 / 720.f, 1 / 120.f);
  series = fmaf(-rate, series, 1 / 24.f);
  series = fmaf(-rate, series, 1 / 6.f);
  series = fmaf(-rate, series, 1 / 2.f);
  const float change = rate < 0.25f ? -rate * fmaf(-rate, series, 1.f) : decay - 1;
  return rate >= kLn2 ? decay : change;  // without branches, which lanes would take in turn
}
__device__ inline double change_of_rate(double rate) {
  return rate >= kLn2 ? decay_of_rate(rate) : expm1(-rate);
}

__device__ inline float kept_of(float change) {
  constexpr int kOne = 0x3f800000;  // the bits of 1.f
  return __int_as_float(__float_as_int(change) >> 31 & kOne);
}
__device__ inline double kept_of(double change) { return __double2hiint(change) < 0 ? 1 : 0; }

// The same of the product of two decays, from theirs. `a` is a running product: where b is always the
// same, what is added to it is not, so neither is what rounding loses.
template <class T>
__device__ T change_of_product(T a, T b) {
  const T kept_a = kept_of(a), kept_b = kept_of(b);
  const T change = kept_b * a + (a * b + kept_a * b);
  if (kept_a * kept_b == 0) return fabs(change);  // not -0
  return change < T(-0.5) ? 1 + change : -fabs(change);
}

}  // namespace rwkv6::cuda
