// A small class of SIMD vectors over the compilers' vector extensions: one source for all
// instruction sets.
// Included by isa.inc inside the namespace of one instruction set.

#define RWKV6_INLINE inline __attribute__((always_inline))
// For what handles whole rows: a call costs nothing beside them, and copies of it in every caller
// would double the code and the time to compile it.
#define RWKV6_OUTLINE __attribute__((noinline))
#define RWKV6_UNROLLED(...) _Pragma("GCC unroll 16") for (__VA_ARGS__)

typedef float FloatLanes __attribute__((vector_size(RWKV6_VECTOR_BYTES)));
typedef double DoubleLanes __attribute__((vector_size(RWKV6_VECTOR_BYTES)));
typedef int32_t Int32Lanes __attribute__((vector_size(RWKV6_VECTOR_BYTES)));
typedef uint32_t Uint32Lanes __attribute__((vector_size(RWKV6_VECTOR_BYTES)));
typedef uint16_t Uint16Lanes __attribute__((vector_size(RWKV6_VECTOR_BYTES / 2)));

template <class T>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef FloatLanes type;
};
template <>
struct LanesOf<double> {
  typedef DoubleLanes type;
};

template <class T>
struct DTypeOf {
  static constexpr DType value = sizeof(T) == 8 ? DType::f64 : DType::f32;
};

template <class T>
struct Vec {
  typedef typename LanesOf<T>::type Lanes;
  static constexpr int64_t W = RWKV6_VECTOR_BYTES / sizeof(T);
  Lanes x;

  RWKV6_INLINE Vec() {}
  RWKV6_INLINE Vec(Lanes lanes) : x(lanes) {}
  RWKV6_INLINE explicit Vec(T value) : x(value - Lanes{}) {}

  static RWKV6_INLINE Vec load(const T* p) {
    Vec v;
    __builtin_memcpy(&v.x, p, sizeof v.x);
    return v;
  }
  RWKV6_INLINE void store(T* p) const { __builtin_memcpy(p, &x, sizeof x); }

  // Loads n lanes, the others are zero; stores only the first n lanes.
  static RWKV6_INLINE Vec load_first(const T* p, int64_t n) {
    T lanes[W] = {};
    memcpy(lanes, p, size_t(n) * sizeof(T));
    return load(lanes);
  }
  RWKV6_INLINE void store_first(T* p, int64_t n) const { memcpy(p, &x, size_t(n) * sizeof(T)); }

  friend RWKV6_INLINE Vec operator*(Vec a, Vec b) { return a.x * b.x; }
  friend RWKV6_INLINE Vec operator+(Vec a, Vec b) { return a.x + b.x; }
  friend RWKV6_INLINE Vec operator-(Vec a, Vec b) { return a.x - b.x; }
};

// a * b + c, with one rounding where the instruction set has it. Every fused multiply-add is
// written out as a call of this function, and the build forbids the compiler to make its own
// (-ffp-contract=off): an element must get the same bits in whichever loop it is computed.
RWKV6_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#ifdef RWKV6_FMA_F32
  return FloatLanes(RWKV6_FMA_F32(a.x, b.x, c.x));
#else
  return a * b + c;
#endif
}
RWKV6_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#ifdef RWKV6_FMA_F64
  return DoubleLanes(RWKV6_FMA_F64(a.x, b.x, c.x));
#else
  return a * b + c;
#endif
}

// x bounded from below or from above; a NaN stays a NaN.
RWKV6_INLINE Vec<float> at_least(Vec<float> low, Vec<float> x) {
#ifdef RWKV6_MAX_F32
  return FloatLanes(RWKV6_MAX_F32(low.x, x.x));
#else
  return FloatLanes(low.x > x.x ? low.x : x.x);
#endif
}
RWKV6_INLINE Vec<float> at_most(Vec<float> high, Vec<float> x) {
#ifdef RWKV6_MIN_F32
  return FloatLanes(RWKV6_MIN_F32(high.x, x.x));
#else
  return FloatLanes(high.x < x.x ? high.x : x.x);
#endif
}

template <int... lanes>
struct Shuffle {  // lanes 0 to W - 1 are a's, lanes W to 2 W - 1 b's
  template <class Lanes>
  static RWKV6_INLINE Lanes of(Lanes a, Lanes b) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, lanes...);
#else
    typedef std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t> Index;
    typedef Index Indices __attribute__((vector_size(sizeof(Lanes))));
    return __builtin_shuffle(a, b, Indices{lanes...});
#endif
  }
};

// Adds the two halves of each run of 2 * half lanes, first of a and then of b: the result has runs
// of `half` lanes.
template <int half, class V, int... lane>
RWKV6_INLINE V fold(V a, V b, std::integer_sequence<int, lane...>) {
  return V(Shuffle<(lane / half * 2 * half + lane % half)...>::of(a.x, b.x)) +
         V(Shuffle<(lane / half * 2 * half + lane % half + half)...>::of(a.x, b.x));
}

// Lane i of the result: the sum of all lanes of v[i], in a fixed order; 0 from v[n] on.
template <int n, int half, class V>
RWKV6_INLINE V sums_from(const V* v) {
  V folded[(n + 1) / 2];
  RWKV6_UNROLLED (int i = 0; i < (n + 1) / 2; i++)
    folded[i] = fold<half>(v[2 * i], 2 * i + 1 < n ? v[2 * i + 1] : V(0),
                           std::make_integer_sequence<int, int(V::W)>());
  if constexpr (half == 1)
    return folded[0];
  else
    return sums_from<(n + 1) / 2, half / 2>(folded);
}
// out[i]: the sum of all lanes of v[i]. out has room for n rounded up to whole vectors.
template <int n, class T>
RWKV6_INLINE void store_sums(const Vec<T>* v, T* out) {
  constexpr int W = Vec<T>::W;
  if constexpr (n > W) {
    store_sums<W>(v, out);
    store_sums<n - W>(v + W, out + W);
  } else {
    sums_from<n, W / 2>(v).store(out);
  }
}
