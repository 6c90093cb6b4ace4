// Rows of N values on their way between memory of any dtype and the accumulator's dtype T.
// Included by isa.inc inside the namespace of one instruction set.

RWKV6_INLINE float f32_of_f16(uint16_t h) {
  // The exponent is rebiased by a product, exactly; f16 denormals are integers times 2^-24. Neither
  // meets an f32 denormal, which the kernels flush.
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  float f;
  if (magnitude < 0x400) {
    f = float(magnitude) * 0x1p-24f;
  } else {
    const uint32_t bits =
        magnitude < 0x7c00 ? (magnitude << 13) + (112u << 23) : (magnitude << 13) | 0x7f800000u;
    __builtin_memcpy(&f, &bits, 4);
  }
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  bits |= sign;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

RWKV6_INLINE uint16_t f16_of_f32(float f) {  // to nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000) {                                 // an f16 denormal: 2^-24 units
    float m;
    __builtin_memcpy(&m, &magnitude, 4);
    const float shifted = m + 0.5f;  // the sum's last bit is 2^-24: the addition rounds for us
    uint32_t units;
    __builtin_memcpy(&units, &shifted, 4);
    return uint16_t(sign | (units - 0x3f000000));
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + odd) >> 13));
}

// One vector's width of f16 values to f32 and back.
RWKV6_INLINE void f16_load(const uint16_t* p, float* out) {
#ifdef RWKV6_F16_LOAD
  RWKV6_F16_LOAD(p, out);
#else
  for (int64_t i = 0; i < Vec<float>::W; i++) out[i] = f32_of_f16(p[i]);
#endif
}
RWKV6_INLINE void f16_store(const float* in, uint16_t* p) {
#ifdef RWKV6_F16_STORE
  RWKV6_F16_STORE(in, p);
#else
  for (int64_t i = 0; i < Vec<float>::W; i++) p[i] = f16_of_f32(in[i]);
#endif
}

// Rows are far apart in memory, where no hardware prefetcher finds the next one: the kernels name
// it.
template <bool Write = false>
RWKV6_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(row) + i, Write);
}

// Reads n values and pads with zeros up to a multiple of the vector width. A null row is zeros.
template <class T>
RWKV6_INLINE void load_row(const void* row, DType dtype, int64_t n, T* out) {
  constexpr int64_t W = Vec<T>::W;
  const int64_t padded = (n + W - 1) / W * W;
  int64_t i = 0;
  if (!row) {
    n = 0;
  } else if (dtype == DType::f64) {
    const double* p = static_cast<const double*>(row);
    for (; i < n; i++) out[i] = T(p[i]);
  } else if (dtype == DType::f32) {
    const float* p = static_cast<const float*>(row);
    if constexpr (sizeof(T) == 4) {
      for (; i + W <= n; i += W) Vec<T>::load(p + i).store(out + i);
    }
    for (; i < n; i++) out[i] = T(p[i]);
  } else if (dtype == DType::bf16) {
    const uint16_t* p = static_cast<const uint16_t*>(row);
    if constexpr (sizeof(T) == 4) {
      for (; i + W <= n; i += W) {
        Uint16Lanes halves;
        __builtin_memcpy(&halves, p + i, sizeof halves);
        Vec<T>((FloatLanes)(__builtin_convertvector(halves, Uint32Lanes) << 16)).store(out + i);
      }
    }
    for (; i < n; i++) {
      const uint32_t bits = uint32_t(p[i]) << 16;
      float f;
      __builtin_memcpy(&f, &bits, 4);
      out[i] = T(f);
    }
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(row);
    if constexpr (sizeof(T) == 4) {
      for (; i + W <= n; i += W) f16_load(p + i, out + i);
    }
    for (; i < n; i++) out[i] = T(f32_of_f16(p[i]));
  }
  for (i = n; i < padded; i++) out[i] = T(0);
}

template <class T>
void store_row(const T* in, int64_t n, DType dtype, void* row) {
  int64_t i = 0;
  if (dtype == DType::f64) {
    double* p = static_cast<double*>(row);
    for (; i < n; i++) p[i] = double(in[i]);
  } else if (dtype == DType::f32) {
    float* p = static_cast<float*>(row);
    for (; i < n; i++) p[i] = float(in[i]);
  } else if (dtype == DType::bf16) {
    uint16_t* p = static_cast<uint16_t*>(row);
    for (; i < n; i++) {
      const float f = float(in[i]);
      uint32_t bits;
      __builtin_memcpy(&bits, &f, 4);
      const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
      p[i] = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
  } else {
    uint16_t* p = static_cast<uint16_t*>(row);
    if constexpr (sizeof(T) == 4) {
      constexpr int64_t W = Vec<T>::W;
      for (; i + W <= n; i += W) f16_store(in + i, p + i);
    }
    for (; i < n; i++) p[i] = f16_of_f32(float(in[i]));
  }
}

// exp(x) of f32 lanes for x in [-87.3, 88]: 2^n * e^f with |f| <= ln(2) / 2. NaN gives garbage.
RWKV6_INLINE Vec<float> exp_lanes(Vec<float> x) {
  typedef Vec<float> V;
  const V magic(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const V shifted = fma(x, V(1.44269504f), magic);
  const V n = shifted + V(-12582912.f);
  const V f = fma(n, V(1.42860677e-6f), fma(n, V(-0.693148613f), x));  // ln 2 in two pieces
  // minimax for the relative error over |f| <= ln(2) / 2: 3.1e-9
  V p(0.0013814540579915047f);
  p = fma(p, f, V(0.00836874544620514f));
  p = fma(p, f, V(0.04166838899254799f));
  p = fma(p, f, V(0.1666652113199234f));
  p = fma(p, f, V(0.4999999403953552f));
  p = fma(p * f, f, f) + V(1.f);
  return (FloatLanes)((Int32Lanes)p.x + ((Int32Lanes)shifted.x << 23));
}

// decay[i] = exp(-exp(w[i])) and, where wanted, rate[i] = exp(w[i]), for n values padded to W; the
// padding gets decay 1. Every w is good: decay is 1 up to -87 and 0 from 80 on, where also
// rate * decay, the derivative, is an exact 0. rate stops at exp(80), so that it stays finite.
RWKV6_INLINE void decay_row(const float* w, int64_t n, float* decay, float* rate) {
  typedef Vec<float> V;
  const FloatLanes low = V(-87.f).x, high = V(80.f).x, zero = V(0.f).x, one = V(1.f).x;
  for (int64_t i = 0; i < n; i += V::W) {
    const FloatLanes x = V::load(w + i).x;
    const FloatLanes bounded = x < low ? low : x > high ? high : x;
    FloatLanes e = exp_lanes(bounded).x;
    e = x < low ? zero : e;
    const FloatLanes minus = -e;
    FloatLanes d = exp_lanes(minus < low ? low : minus).x;
    d = minus < low ? zero : d;
    d = x == x ? d : x;  // NaN stays NaN
    V(d).store(decay + i);
    if (rate) V(e).store(rate + i);
  }
  for (int64_t i = n; i % V::W; i++) decay[i] = one[0];
}

RWKV6_INLINE void decay_row(const double* w, int64_t n, double* decay, double* rate) {
  for (int64_t i = 0; i < n; i++) {
    const double e = std::exp(w[i] > 80 ? 80 : w[i]);
    decay[i] = std::exp(-e);
    if (rate) rate[i] = e;
  }
  for (int64_t i = n; i % Vec<double>::W; i++) {
    decay[i] = 1;
    if (rate) rate[i] = 0;
  }
}
