// A small vector class over the compilers' vector extensions: one source for every instruction set.
// Included by isa.inc inside the namespace of one instruction set.

#define RWKV6_INLINE inline __attribute__((always_inline))
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

  // The first n lanes of memory, the others zero; and back.
  static RWKV6_INLINE Vec load_first(const T* p, int64_t n) {
    T lanes[W] = {};
    for (int64_t i = 0; i < n; i++) lanes[i] = p[i];
    return load(lanes);
  }
  RWKV6_INLINE void store_first(T* p, int64_t n) const {
    T lanes[W];
    store(lanes);
    for (int64_t i = 0; i < n; i++) p[i] = lanes[i];
  }

  friend RWKV6_INLINE Vec operator*(Vec a, Vec b) { return a.x * b.x; }
  friend RWKV6_INLINE Vec operator+(Vec a, Vec b) { return a.x + b.x; }
  RWKV6_INLINE T sum() const {  // of all lanes, in a fixed order
    T lanes[W];
    store(lanes);
    for (int64_t half = W / 2; half; half /= 2)
      for (int64_t i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
  }
};

// a * b + c in one rounding where the instruction set has it. Spelled out, for the build forbids
// the compiler to contract on its own: the same element must get the same bits in every loop.
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
