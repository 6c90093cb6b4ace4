// Loads and stores of rows of N values: conversions between memory of any dtype and the
// accumulator's dtype T, and the decays computed from rows of w.
// Included by isa.inc inside the namespace of one instruction set.

RWKV6_INLINE float f32_of_f16(uint16_t h) {
  // A normal number's exponent is rebiased; an f16 denormal is an integer times 2^-24. Neither way
  // passes through an f32 denormal, which the kernels treat as zero.
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
    const float shifted = m + 0.5f;  // the last bit of the sum is 2^-24, so the addition rounds
    uint32_t units;
    __builtin_memcpy(&units, &shifted, 4);
    return uint16_t(sign | (units - 0x3f000000));
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + odd) >> 13));
}

// 16-bit numbers in memory, and loads and stores of one vector of T from and to any dtype.
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class T>
RWKV6_INLINE Vec<T> load_as(const T* p) {
  return Vec<T>::load(p);
}
template <class T>
RWKV6_INLINE Vec<T> load_as(const BF16* p) {
  Uint16Lanes bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (FloatLanes)(__builtin_convertvector(bits, Uint32Lanes) << 16);
}
template <class T>
RWKV6_INLINE Vec<T> load_as(const F16* p) {
#ifdef RWKV6_F16_LOAD
  return FloatLanes(RWKV6_F16_LOAD(p));
#else
  Vec<T> v;
  for (int64_t i = 0; i < Vec<T>::W; i++) v.x[i] = f32_of_f16(p[i].bits);
  return v;
#endif
}

// Whole numbers, from the int8 weights of matvec.h.
template <class T>
RWKV6_INLINE Vec<T> load_as(const int8_t* p) {
#ifdef RWKV6_INT8_LOAD
  if constexpr (sizeof(T) == 4) return FloatLanes(RWKV6_INT8_LOAD(p));
#endif
  Vec<T> v;
  for (int64_t i = 0; i < Vec<T>::W; i++) v.x[i] = T(p[i]);
  return v;
}

template <class T>
RWKV6_INLINE void store_as(Vec<T> v, T* p) {
  v.store(p);
}
RWKV6_INLINE void store_as(Vec<float> v, BF16* p) {
  const Uint32Lanes bits = (Uint32Lanes)v.x;
  const Uint32Lanes rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
  const Uint32Lanes good = v.x == v.x ? rounded : rounded * 0 + 0x7fc0;
  const Uint16Lanes halves = __builtin_convertvector(good, Uint16Lanes);
  __builtin_memcpy(p, &halves, sizeof halves);
}
RWKV6_INLINE void store_as(Vec<float> v, F16* p) {
#ifdef RWKV6_F16_STORE
  RWKV6_F16_STORE(p, v.x);
#else
  for (int64_t i = 0; i < Vec<float>::W; i++) p[i].bits = f16_of_f32(v.x[i]);
#endif
}

// n rounded up to whole vectors.
template <class T>
constexpr int64_t padded(int64_t n) {
  return (n + Vec<T>::W - 1) / Vec<T>::W * Vec<T>::W;
}

template <class T, class X>
RWKV6_INLINE void load_values(const void* row, int64_t n, T* out) {
  const X* p = static_cast<const X*>(row);
  int64_t i = 0;
  for (; i + Vec<T>::W <= n; i += Vec<T>::W) load_as<T>(p + i).store(out + i);
  if (i < n) {
    X last[Vec<T>::W] = {};
    memcpy(last, p + i, size_t(n - i) * sizeof(X));
    load_as<T>(last).store(out + i);
  }
}
template <class T, class X>
RWKV6_INLINE void store_values(const T* in, int64_t n, void* row) {
  X* p = static_cast<X*>(row);
  int64_t i = 0;
  for (; i + Vec<T>::W <= n; i += Vec<T>::W) store_as(Vec<T>::load(in + i), p + i);
  if (i < n) {
    X last[Vec<T>::W];
    store_as(Vec<T>::load(in + i), last);
    memcpy(p + i, last, size_t(n - i) * sizeof(X));
  }
}

// Reads n values and pads with zeros up to a multiple of the vector width. A null row is zeros.
RWKV6_INLINE void load_row(const void* row, DType dtype, int64_t n, float* out) {
  if (!row)
    for (int64_t i = 0; i < n; i += Vec<float>::W) Vec<float>(0.f).store(out + i);
  else if (dtype == DType::f32)
    load_values<float, float>(row, n, out);
  else if (dtype == DType::bf16)
    load_values<float, BF16>(row, n, out);
  else
    load_values<float, F16>(row, n, out);
}
RWKV6_INLINE void load_row(const void* row, DType dtype, int64_t n, double* out) {
  if (row && dtype == DType::f64) return load_values<double, double>(row, n, out);
  for (int64_t i = 0; i < n; i += Vec<double>::W) Vec<double>(0.).store(out + i);
  if (row)  // w and u may be f32 beside f64
    for (int64_t i = 0; i < n; i++) out[i] = double(static_cast<const float*>(row)[i]);
}

// Writes n values; `in` can be read up to a multiple of the vector width.
RWKV6_INLINE void store_row(const float* in, int64_t n, DType dtype, void* row) {
  if (dtype == DType::f32)
    store_values<float, float>(in, n, row);
  else if (dtype == DType::bf16)
    store_values<float, BF16>(in, n, row);
  else
    store_values<float, F16>(in, n, row);
}
RWKV6_INLINE void store_row(const double* in, int64_t n, DType dtype, void* row) {
  if (dtype == DType::f64) return store_values<double, double>(in, n, row);
  for (int64_t i = 0; i < n; i++) static_cast<float*>(row)[i] = float(in[i]);
}

// Writes one value, rounded as store_row() does.
RWKV6_INLINE void store_value(float x, DType dtype, void* to) {
  if (dtype == DType::f32) {
    *static_cast<float*>(to) = x;
  } else if (dtype == DType::bf16) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
    static_cast<BF16*>(to)->bits = uint16_t(x == x ? rounded : 0x7fc0);
  } else {
    static_cast<F16*>(to)->bits = f16_of_f32(x);
  }
}
RWKV6_INLINE void store_value(double x, DType dtype, void* to) {
  if (dtype == DType::f64)
    *static_cast<double*>(to) = x;
  else
    *static_cast<float*>(to) = float(x);
}

// Copies whole cache lines of 64 bytes with stores that bypass the caches, where the CPU has them:
// the old contents of the memory need not be read first. For memory that is not read again soon;
// finish_streams() must be called after the last copy.
RWKV6_INLINE void stream_lines(const void* from, int64_t bytes, void* to) {
#if defined(__x86_64__)
  const __m128i* in = static_cast<const __m128i*>(from);
  __m128i* out = static_cast<__m128i*>(to);
  for (int64_t i = 0; i < bytes / 16; i++) _mm_stream_si128(out + i, _mm_loadu_si128(in + i));
#else
  memcpy(to, from, size_t(bytes));
#endif
}
RWKV6_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// p * 2^n for an integer n and p in [0.7, 1.5], or 0 where that is not a normal number. n may be as
// low as -126, and any where the instruction set has an instruction for this.
RWKV6_INLINE Vec<float> scale(Vec<float> p, Vec<float> n) {
#ifdef RWKV6_SCALE_F32
  return FloatLanes(RWKV6_SCALE_F32(p.x, n.x));
#else
  return (FloatLanes)((Int32Lanes)p.x + (__builtin_convertvector(n.x, Int32Lanes) << 23));
#endif
}

// p[t] = c[0] + c[1] x[t] + c[2] x[t]^2 + ... by Horner's rule. The C chains of dependent
// instructions are interleaved, since a single chain would wait at every step.
template <int terms, int C>
RWKV6_INLINE void polynomial(const float (&c)[terms], const Vec<float> (&x)[C],
                             Vec<float> (&p)[C]) {
  RWKV6_UNROLLED (int t = 0; t < C; t++) p[t] = Vec<float>(c[terms - 1]);
  RWKV6_UNROLLED (int n = terms - 2; n >= 0; n--)
    RWKV6_UNROLLED (int t = 0; t < C; t++) p[t] = fma(p[t], x[t], Vec<float>(c[n]));
}

// (2^x - 1) / x, so that 2^x is minimax over |x| <= 1/2 with value 1 at 0: relative error 9.1e-8
constexpr float kExp2[5] = {0.693147004f, 0.240222424f, 0.0555073358f, 0.00967151299f,
                            0.00132647273f};
#ifdef RWKV6_SCALE_F32
// -log2(e) 2^x, minimax over 0 <= x < 1: relative error 7.5e-8
constexpr float kScaledExp2[6] = {-1.4426949f,    -1.00000846f,   -0.346468419f,
                                  -0.0805403516f, -0.0129688764f, -0.00270877057f};
#endif

// Replaces x[t] by 2^x[t], with a relative error of 1.6e-7 and exactly 1 at 0. x has the range of n
// in scale(). change[t] becomes 2^x[t] - 1 where |x[t]| <= 1/2, accurate also near 0; for smaller x
// it is some number below -1/2.
template <int C>
RWKV6_INLINE void exp2_lanes(Vec<float> (&x)[C], Vec<float> (&change)[C]) {
  typedef Vec<float> V;
  V n[C], p[C];
#ifdef RWKV6_SCALE_F32
  RWKV6_UNROLLED (int t = 0; t < C; t++) {
    const V rest = FloatLanes(RWKV6_MINUS_NEAREST_F32(x[t].x));
    n[t] = x[t] - rest;
    x[t] = rest;
  }
#else
  const V magic(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  RWKV6_UNROLLED (int t = 0; t < C; t++) n[t] = x[t] + magic;
  RWKV6_UNROLLED (int t = 0; t < C; t++) n[t] = n[t] - magic;
  RWKV6_UNROLLED (int t = 0; t < C; t++) x[t] = x[t] - n[t];
#endif
  polynomial(kExp2, x, p);
  RWKV6_UNROLLED (int t = 0; t < C; t++) {
    change[t] = fma(p[t], x[t], n[t]);
    x[t] = scale(fma(p[t], x[t], V(1.f)), n[t]);
  }
}
template <int C>
RWKV6_INLINE void exp2_lanes(Vec<float> (&x)[C]) {
  Vec<float> change[C];
  exp2_lanes(x, change);
}

// From one vector of w of each of C tokens: rate = exp(w), decay = exp(-exp(w)), and change = decay
// - 1. change is accurate where decay > 1/2, also where decay is so near 1 that the difference
// would have lost all digits; elsewhere it is some number below -1/2. Every w is valid: decay is 1
// for w below -17, and 0 from w = 80 on at the latest, where rate * decay, the derivative, is also
// exactly 0. rate stays finite, because w is bounded by 80 for it.
template <int C>
RWKV6_INLINE void decay_lanes(const Vec<float> (&w)[C], Vec<float> (&rate)[C],
                              Vec<float> (&decay)[C], Vec<float> (&change)[C]) {
  typedef Vec<float> V;
#ifdef RWKV6_SCALE_F32
  V p[C], y[C], rest[C];  // y = -log2(e) exp(w); this scale() multiplies by 2^floor of its argument
  RWKV6_UNROLLED (int t = 0; t < C; t++) y[t] = at_most(V(80.f), w[t]) * V(1.44269504f);
  RWKV6_UNROLLED (int t = 0; t < C; t++) rest[t] = FloatLanes(RWKV6_MINUS_FLOOR_F32(y[t].x));
  polynomial(kScaledExp2, rest, p);
  RWKV6_UNROLLED (int t = 0; t < C; t++) {
    y[t] = scale(p[t], y[t]);
    rate[t] = y[t] * V(-0.693147181f);
    decay[t] = y[t];
  }
  exp2_lanes(decay, change);
#else
  RWKV6_UNROLLED (int t = 0; t < C; t++)
    rate[t] = at_most(V(80.f), at_least(V(-87.f), w[t])) * V(1.44269504f);
  exp2_lanes(rate);
  V bounded[C];
  RWKV6_UNROLLED (int t = 0; t < C; t++) {
    decay[t] = rate[t] * V(-1.44269504f);
    bounded[t] = at_least(V(-126.f), decay[t]);
  }
  exp2_lanes(bounded, change);
  RWKV6_UNROLLED (int t = 0; t < C; t++)
    decay[t] = FloatLanes(decay[t].x < V(-126.f).x ? V(0.f).x : bounded[t].x);
#endif
}

template <int C>
RWKV6_INLINE void decay_lanes(const Vec<double> (&w)[C], Vec<double> (&rate)[C],
                              Vec<double> (&decay)[C], Vec<double> (&change)[C]) {
  typedef Vec<double> V;
  for (int t = 0; t < C; t++) {
    for (int i = 0; i < V::W; i++) {
      rate[t].x[i] = std::exp(w[t].x[i] > 80 ? 80 : w[t].x[i]);
      decay[t].x[i] = std::exp(-rate[t].x[i]);
    }
    const V x = V(0.) - rate[t];
    V series(1. / 120);  // (exp(x) - 1) / x
    for (double term : {1. / 24, 1. / 6, 1. / 2, 1.}) series = fma(series, x, V(term));
    const V small(1. / 256);
    change[t] = V(rate[t].x < small.x ? (x * series).x : (decay[t] - V(1.)).x);
  }
}

// Splits a product of decays into two parts, high + low: its nearest number and what that lost by
// rounding. change is product - 1, which is more accurate than the product where that is near 1. On
// entry low is what the products before lost, relative to themselves; it is added before rounding.
// (Where decays are fast, below 1/2, low is 0: an error in such a state is soon forgotten.)
template <class T>
RWKV6_INLINE void split_decay(Vec<T> product, Vec<T> change, Vec<T>& high, Vec<T>& low) {
  typedef Vec<T> V;
  const V one(T(1)), zero(T(0)), fast(T(-0.5));
  const auto slow = change.x > fast.x;
  const V exact = change + low, near = one + exact;
  high = V(slow ? near.x : product.x);
  low = V(slow ? (exact - (near - one)).x : zero.x);
}

// decay_lanes() of a row of n values, in whole vectors. rate and change may be nullptr: not wanted.
template <class T>
RWKV6_INLINE void decay_row(const T* w, int64_t n, T* decay, T* rate = nullptr,
                            T* change = nullptr) {
  typedef Vec<T> V;
  int64_t i = 0;
  const auto next = [&](auto count) {
    constexpr int Q = count;
    V x[Q], e[Q], d[Q], c[Q];
    RWKV6_UNROLLED (int q = 0; q < Q; q++) x[q] = V::load(w + i + q * V::W);
    decay_lanes(x, e, d, c);
    RWKV6_UNROLLED (int q = 0; q < Q; q++) {
      d[q].store(decay + i + q * V::W);
      if (rate) e[q].store(rate + i + q * V::W);
      if (change) c[q].store(change + i + q * V::W);
    }
    i += Q * V::W;
  };
  while (i + 4 * V::W <= n) next(std::integral_constant<int, 4>());
  while (i < n) next(std::integral_constant<int, 1>());
}
