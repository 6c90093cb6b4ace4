// Arithmetic of integers, float, double and the 16-bit formats. The approximate functions
// (ex2.approx and so on) are those of the C library, more accurate than a GPU's.
#include <array>
#include <cfenv>

#include "statement.h"

namespace ptxcpu {
namespace {

// ---- towards zero, down or up: add.rz, fma.rm and so on ----

bool is_directed(const Statement& s) { return s.has("rz") || s.has("rm") || s.has("rp"); }

// The host rounds so meanwhile; asm keeps the compiler from moving the operation away.
template <class T, class... A, class F>
void directed(Statement& s, F f, int flops) {
  int mode = s.has("rz") ? FE_TOWARDZERO : s.has("rm") ? FE_DOWNWARD : FE_UPWARD;
  bool flush = s.has("ftz");
  if (s.has("sat")) s.unsupported();
  lanewise<T, A...>(
      s,
      [=](A... a) {
        if (flush) ((a = T(flush_denormal(float(a)))), ...);
        std::fesetround(mode);
        (([&] { asm volatile("" : "+m"(a)); }()), ...);
        T result = f(a...);
        asm volatile("" : "+m"(result));
        std::fesetround(FE_TONEAREST);
        return canonical_nan(flush ? T(flush_denormal(float(result))) : result);
      },
      flops);
}

template <class T>
void directed_operation(Statement& s) {
  const std::string& name = s.name;
  if (name == "add") return directed<T, T, T>(s, [](T a, T b) { return a + b; }, 1);
  if (name == "sub") return directed<T, T, T>(s, [](T a, T b) { return a - b; }, 1);
  if (name == "mul") return directed<T, T, T>(s, [](T a, T b) { return a * b; }, 1);
  if (name == "div") return directed<T, T, T>(s, [](T a, T b) { return a / b; }, 1);
  if (name == "fma" || name == "mad")
    return directed<T, T, T, T>(s, [](T a, T b, T c) { return std::fma(a, b, c); }, 2);
  if (name == "sqrt") return directed<T, T>(s, [](T a) { return std::sqrt(a); }, 1);
  if (name == "rcp") return directed<T, T>(s, [](T a) { return 1 / a; }, 1);
  s.unsupported();
}

// ---- float ----

template <class... A, class F>
void with_flags(Statement& s, F operation, int flops) {
  bool flush = s.has("ftz"), saturated = s.has("sat");
  bool only_the_sign = s.name == "neg" || s.name == "abs" || s.name == "copysign";
  if (only_the_sign && !flush && !saturated) return lanewise<float, A...>(s, operation, flops);
  auto f = [operation](A... a) { return canonical_nan(operation(a...)); };
  if (!flush && !saturated) return lanewise<float, A...>(s, f, flops);
  auto flushed = [flush](float x) { return flush ? flush_denormal(x) : x; };
  lanewise<float, A...>(
      s,
      [=](A... a) {
        float result = flushed(f(flushed(a)...));
        return saturated ? saturate(result) : result;
      },
      flops);
}
template <class F>
void float1(Statement& s, F f, int flops = 1) {
  with_flags<float>(s, f, flops);
}
template <class F>
void float2(Statement& s, F f, int flops = 1) {
  with_flags<float, float>(s, f, flops);
}
template <class F>
void float3(Statement& s, F f, int flops = 2) {
  with_flags<float, float, float>(s, f, flops);
}

template <class T>
T nan_or(T a, T b, T result) {
  return a != a || b != b ? T(NAN) : result;
}

void float_operation(Statement& s) {
  if (is_directed(s)) return directed_operation<float>(s);
  if (s.has("xorsign")) s.unsupported();
  const std::string& name = s.name;
  bool nan = s.has("NaN");
  if (name == "add") return float2(s, [](float a, float b) { return a + b; });
  if (name == "sub") return float2(s, [](float a, float b) { return a - b; });
  if (name == "mul") return float2(s, [](float a, float b) { return a * b; });
  if (name == "div") return float2(s, [](float a, float b) { return a / b; });
  if (name == "min" && nan)
    return float2(s, [](float a, float b) { return nan_or(a, b, std::fmin(a, b)); });
  if (name == "max" && nan)
    return float2(s, [](float a, float b) { return nan_or(a, b, std::fmax(a, b)); });
  if (name == "min") return float2(s, [](float a, float b) { return std::fmin(a, b); });
  if (name == "max") return float2(s, [](float a, float b) { return std::fmax(a, b); });
  if (name == "copysign") return float2(s, [](float a, float b) { return std::copysign(b, a); }, 0);
  if (name == "fma" || name == "mad")
    return float3(s, [](float a, float b, float c) { return __builtin_fmaf(a, b, c); });
  if (name == "neg") return float1(s, [](float a) { return -a; });
  if (name == "abs") return float1(s, [](float a) { return std::fabs(a); });
  if (name == "ex2") return float1(s, [](float a) { return exp2f(a); });
  if (name == "lg2") return float1(s, [](float a) { return log2f(a); });
  if (name == "rcp") return float1(s, [](float a) { return 1.f / a; });
  if (name == "sqrt") return float1(s, [](float a) { return sqrtf(a); });
  if (name == "rsqrt") return float1(s, [](float a) { return float(1.0 / sqrt(double(a))); });
  if (name == "sin") return float1(s, [](float a) { return sinf(a); });
  if (name == "cos") return float1(s, [](float a) { return cosf(a); });
  if (name == "tanh") return float1(s, [](float a) { return tanhf(a); });
  s.unsupported();
}

// ---- double ----

template <class F>
void double1(Statement& s, F f) {
  lanewise<double, double>(s, f, 1);
}
template <class F>
void double2(Statement& s, F f) {
  lanewise<double, double, double>(s, f, 1);
}

void double_operation(Statement& s) {
  if (is_directed(s)) return directed_operation<double>(s);
  const std::string& name = s.name;
  if (name == "add") return double2(s, [](double a, double b) { return a + b; });
  if (name == "sub") return double2(s, [](double a, double b) { return a - b; });
  if (name == "mul") return double2(s, [](double a, double b) { return a * b; });
  if (name == "div") return double2(s, [](double a, double b) { return a / b; });
  if (name == "min") return double2(s, [](double a, double b) { return std::fmin(a, b); });
  if (name == "max") return double2(s, [](double a, double b) { return std::fmax(a, b); });
  if (name == "copysign") return double2(s, [](double a, double b) { return std::copysign(b, a); });
  if (name == "fma" || name == "mad")
    return lanewise<double, double, double, double>(
        s, [](double a, double b, double c) { return std::fma(a, b, c); }, 2);
  if (name == "neg") return double1(s, [](double a) { return -a; });
  if (name == "abs") return double1(s, [](double a) { return std::fabs(a); });
  if (name == "sqrt") return double1(s, [](double a) { return std::sqrt(a); });
  if (name == "rcp" && s.has("approx"))  // ignores the low half of its argument
    return double1(
        s, [](double a) { return 1 / bits<double>(bits<uint64_t>(a) & 0xffffffff00000000); });
  if (name == "rcp") return double1(s, [](double a) { return 1 / a; });
  if (name == "rsqrt") return double1(s, [](double a) { return 1 / std::sqrt(a); });
  s.unsupported();
}

// ---- half and bfloat16, one or two in a register: computed in double, rounded once ----

struct Format {
  void (*read)(const uint16_t* from, double* to, int n);
  void (*round)(const double* from, uint16_t* to, int n);
};
constexpr Format kHalf = {
    [](const uint16_t* from, double* to, int n) { std::transform(from, from + n, to, from_half); },
    [](const double* from, uint16_t* to, int n) { std::transform(from, from + n, to, to_half); },
};
constexpr Format kBFloat16 = {
    [](const uint16_t* from, double* to, int n) {
      std::transform(from, from + n, to, from_bfloat16);
    },
    [](const double* from, uint16_t* to, int n) {
      std::transform(from, from + n, to, to_bfloat16);
    },
};

// destination = f(sources) of registers that hold one number, or two one after the other.
template <int sources, class F>
void sixteen_bit(Statement& s, const Format& format, F f, int flops) {
  int numbers = s.width() / 2;
  std::array<uint32_t, sources> from;
  for (int i = 0; i < sources; i++) {
    from[i] = numbers == 2 ? s.in<uint32_t>(i + 1).offset : s.in<uint16_t>(i + 1).offset;
  }
  uint32_t to = numbers == 2 ? s.out<uint32_t>(0).offset : s.out<uint16_t>(0).offset;
  s.emit([=, &format](Warp& warp, Mask mask) {
    warp.count_flops(mask, flops * numbers);
    constexpr int kMost = 2 * kLanes;
    double x[3][kMost] = {}, results[kMost];
    for (int i = 0; i < sources; i++) {
      format.read(Register<uint16_t>{from[i]}(warp), x[i], numbers * kLanes);
    }
    for (int i = 0; i < kMost; i++) results[i] = f(x[0][i], x[1][i], x[2][i]);
    alignas(4) uint16_t rounded[kMost];
    format.round(results, rounded, numbers * kLanes);
    if (numbers == 2) {
      write_lanes(Register<uint32_t>{to}(warp), reinterpret_cast<uint32_t*>(rounded), mask);
    } else {
      write_lanes(Register<uint16_t>{to}(warp), rounded, mask);
    }
  });
}

void sixteen_bit_operation(Statement& s, const Format& format) {
  const std::string& name = s.name;
  auto one = [&](auto f) {
    sixteen_bit<1>(s, format, [f](double a, double, double) { return f(a); }, 1);
  };
  auto two = [&](auto f) {
    sixteen_bit<2>(s, format, [f](double a, double b, double) { return f(a, b); }, 1);
  };
  auto three = [&](auto f) { sixteen_bit<3>(s, format, f, 2); };
  if (s.has("relu") && name == "fma")
    return three([](double a, double b, double c) { return std::fmax(std::fma(a, b, c), 0.0); });
  if (s.has("relu") || s.has("sat") || s.has("xorsign")) s.unsupported();
  if (name == "add") return two([](double a, double b) { return a + b; });
  if (name == "sub") return two([](double a, double b) { return a - b; });
  if (name == "mul") return two([](double a, double b) { return a * b; });
  if (name == "fma") return three([](double a, double b, double c) { return std::fma(a, b, c); });
  if (name == "min" && s.has("NaN"))
    return two([](double a, double b) { return nan_or(a, b, std::fmin(a, b)); });
  if (name == "max" && s.has("NaN"))
    return two([](double a, double b) { return nan_or(a, b, std::fmax(a, b)); });
  if (name == "min") return two([](double a, double b) { return std::fmin(a, b); });
  if (name == "max") return two([](double a, double b) { return std::fmax(a, b); });
  if (name == "neg") return one([](double a) { return -a; });
  if (name == "abs") return one([](double a) { return std::fabs(a); });
  if (name == "ex2") return one([](double a) { return exp2(a); });
  if (name == "tanh") return one([](double a) { return tanh(a); });
  s.unsupported();
}

// ---- integers ----

// f(T()) with the unsigned type of the width: where signs make no difference.
template <class F>
void modulo(Statement& s, F f) {
  with_bits(s, [&](auto zero) {
    using T = decltype(zero);
    lanewise<T, T, T>(s, [f](T a, T b) { return T(f(a, b)); });
  });
}
template <class F>
void integer(Statement& s, F f) {
  with_integer(s, [&](auto zero) {
    using T = decltype(zero);
    lanewise<T, T, T>(s, [f](T a, T b) { return T(f(a, b)); });
  });
}

template <class T>
T divide(T a, T b) {
  if (b == 0) return T(-1);
  if (T(-1) < 0 && b == T(-1)) return T(0) - a;  // the host traps on the overflow
  return T(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if (T(-1) < 0 && b == T(-1)) return 0;
  return T(a % b);
}

template <class T>
struct Wider;
template <>
struct Wider<uint16_t> {
  using type = uint32_t;
};
template <>
struct Wider<int16_t> {
  using type = int32_t;
};
template <>
struct Wider<uint32_t> {
  using type = uint64_t;
};
template <>
struct Wider<int32_t> {
  using type = int64_t;
};
template <>
struct Wider<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct Wider<int64_t> {
  using type = __int128;
};

void multiply_wide(Statement& s) {
  with_integer(s, [&](auto zero) {
    using T = decltype(zero);
    using W = typename Wider<T>::type;
    if constexpr (sizeof(T) < 8) {
      if (s.name == "mul") {
        lanewise<W, T, T>(s, [](T a, T b) { return W(W(a) * W(b)); });
      } else {
        using U = std::make_unsigned_t<W>;
        lanewise<W, T, T, W>(s, [](T a, T b, W c) { return W(U(W(a) * W(b)) + U(c)); });
      }
    } else {
      s.unsupported();
    }
  });
}

void multiply_high(Statement& s) {
  with_integer(s, [&](auto zero) {
    using T = decltype(zero);
    using W = typename Wider<T>::type;
    using U = std::make_unsigned_t<T>;
    auto high = [](T a, T b) { return T(W(W(a) * W(b)) >> (8 * sizeof(T))); };
    if (s.name == "mul") {
      lanewise<T, T, T>(s, high);
    } else {
      lanewise<T, T, T, T>(s, [high](T a, T b, T c) { return T(U(high(a, b)) + U(c)); });
    }
  });
}

void integer_operation(Statement& s) {
  const std::string& name = s.name;
  if (s.has("cc") || s.has("sat")) s.unsupported();
  if (s.has("wide")) return multiply_wide(s);
  if (s.has("hi")) return multiply_high(s);
  if (name == "add") return modulo(s, [](auto a, auto b) { return a + b; });
  if (name == "sub") return modulo(s, [](auto a, auto b) { return a - b; });
  if (name == "mul") return modulo(s, [](auto a, auto b) { return uint64_t(a) * b; });
  if (name == "mad")
    return with_bits(s, [&](auto zero) {
      using T = decltype(zero);
      lanewise<T, T, T, T>(s, [](T a, T b, T c) { return T(uint64_t(a) * b + c); });
    });
  if (name == "div") return integer(s, [](auto a, auto b) { return divide(a, b); });
  if (name == "rem") return integer(s, [](auto a, auto b) { return remainder(a, b); });
  if (name == "min") return integer(s, [](auto a, auto b) { return a < b ? a : b; });
  if (name == "max") return integer(s, [](auto a, auto b) { return a > b ? a : b; });
  if (name == "neg")
    return with_bits(s, [&](auto zero) {
      using T = decltype(zero);
      lanewise<T, T>(s, [](T a) { return T(T(0) - a); });
    });
  if (name == "abs")
    return with_bits(s, [&](auto zero) {
      using T = decltype(zero);
      lanewise<T, T>(s, [](T a) { return a >> (8 * sizeof(T) - 1) ? T(T(0) - a) : a; });
    });
  s.unsupported();
}

void arithmetic(Statement& s) {
  switch (s.type()) {
    case Type::kF32: return float_operation(s);
    case Type::kF64: return double_operation(s);
    case Type::kF16:
    case Type::kF16x2: return sixteen_bit_operation(s, kHalf);
    case Type::kBF16:
    case Type::kBF16x2: return sixteen_bit_operation(s, kBFloat16);
    default: return integer_operation(s);
  }
}

void dot_product_of_bytes(Statement& s) {  // dp4a
  if (s.type(0) != Type::kS32 || s.type(1) != Type::kS32) s.unsupported();
  lanewise<uint32_t, uint32_t, uint32_t, uint32_t>(s, [](uint32_t a, uint32_t b, uint32_t c) {
    for (int i = 0; i < 32; i += 8) c += uint32_t(int8_t(a >> i) * int8_t(b >> i));
    return c;
  });
}

}  // namespace

void add_arithmetic(Decoders& decoders) {
  for (const char* name :
       {"add", "sub",      "mul", "mad", "fma", "div",  "rem",   "min", "max", "neg",
        "abs", "copysign", "ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"}) {
    decoders[name] = arithmetic;
  }
  decoders["dp4a"] = dot_product_of_bytes;
}

}  // namespace ptxcpu
