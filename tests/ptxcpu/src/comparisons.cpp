// setp, set, selp, testp
#include "statement.h"

namespace ptxcpu {
namespace {

enum class Comparison {
  kEq,
  kNe,
  kLt,
  kLe,
  kGt,
  kGe,
  kEqu,
  kNeu,
  kLtu,
  kLeu,
  kGtu,
  kGeu,
  kNum,
  kNan
};

Comparison comparison(Statement& s) {
  static const std::map<std::string, Comparison> kNames = {
      {"eq", Comparison::kEq},   {"ne", Comparison::kNe},   {"lt", Comparison::kLt},
      {"le", Comparison::kLe},   {"gt", Comparison::kGt},   {"ge", Comparison::kGe},
      {"lo", Comparison::kLt},   {"ls", Comparison::kLe},   {"hi", Comparison::kGt},
      {"hs", Comparison::kGe},   {"equ", Comparison::kEqu}, {"neu", Comparison::kNeu},
      {"ltu", Comparison::kLtu}, {"leu", Comparison::kLeu}, {"gtu", Comparison::kGtu},
      {"geu", Comparison::kGeu}, {"num", Comparison::kNum}, {"nan", Comparison::kNan},
  };
  auto it = kNames.find(s.modifiers.at(0));
  if (it == kNames.end()) s.unsupported();
  return it->second;
}

// The ordered comparisons are false where one is NaN, the unordered (u) ones true.
template <class T>
bool compare(Comparison comparison, T a, T b) {
  bool nan = a != a || b != b;
  switch (comparison) {
    case Comparison::kEq: return a == b;
    case Comparison::kNe: return a != b && !nan;
    case Comparison::kLt: return a < b;
    case Comparison::kLe: return a <= b;
    case Comparison::kGt: return a > b;
    case Comparison::kGe: return a >= b;
    case Comparison::kEqu: return a == b || nan;
    case Comparison::kNeu: return a != b;
    case Comparison::kLtu: return a < b || nan;
    case Comparison::kLeu: return a <= b || nan;
    case Comparison::kGtu: return a > b || nan;
    case Comparison::kGeu: return a >= b || nan;
    case Comparison::kNum: return !nan;
    case Comparison::kNan: return nan;
  }
  return false;
}

// Both operands compared for all lanes.
using Compared = std::function<Mask(const Warp&)>;

template <class T, class Read>
Compared compared(Statement& s, Read read) {
  auto a = s.in<T>(1), b = s.in<T>(2);
  Comparison how = comparison(s);
  return [=](const Warp& warp) {
    const T *x = a(warp), *y = b(warp);
    Mask result = 0;
    for (int lane = 0; lane < kLanes; lane++) {
      result |= Mask(compare(how, read(x[lane]), read(y[lane]))) << lane;
    }
    return result;
  };
}

Compared compared(Statement& s) {
  Compared result;
  switch (s.type()) {
    case Type::kF32:
      if (s.has("ftz")) return compared<float>(s, flush_denormal);
      return compared<float>(s, [](float x) { return x; });
    case Type::kF64: return compared<double>(s, [](double x) { return x; });
    case Type::kF16: return compared<uint16_t>(s, from_half);
    case Type::kBF16: return compared<uint16_t>(s, from_bfloat16);
    case Type::kF16x2:
    case Type::kBF16x2: s.unsupported();
    default:
      with_integer(s, [&](auto zero) {
        using T = decltype(zero);
        result = compared<T>(s, [](T x) { return x; });
      });
      return result;
  }
}

enum class Combine { kNot, kAnd, kOr, kXor };

// setp.comparison.combine d|e, a, b, c: d = (a ? b) combined with c, e = (a not ? b) so
void set_predicate(Statement& s) {
  Compared result = compared(s);
  auto [to_name, complement_name] = s.pair(0);
  Predicate to = s.predicate_out(to_name), complement = s.predicate_out(complement_name), with;
  Combine combine = Combine::kNot;
  if (s.operands.size() > 3) {
    combine = s.has("and") ? Combine::kAnd : s.has("or") ? Combine::kOr : Combine::kXor;
    with = s.predicate_in(s.operands[3]);
  }
  s.emit([=](Warp& warp, Mask mask) {
    Mask holds = result(warp), fails = ~holds;
    if (combine != Combine::kNot) {
      Mask other = with.read(warp);
      auto combined = [&](Mask x) {
        return combine == Combine::kAnd  ? x & other
               : combine == Combine::kOr ? x | other
                                         : x ^ other;
      };
      holds = combined(holds);
      fails = combined(fails);
    }
    to.write(warp, mask, holds);
    complement.write(warp, mask, fails);
  });
}

void set_value(Statement& s) {  // set: all bits or 1.0f where the comparison holds
  if (s.type(0) != Type::kF32 && s.type(0) != Type::kU32 && s.type(0) != Type::kS32) {
    s.unsupported();
  }
  Compared result = compared(s);
  auto to = s.out<uint32_t>(0);
  uint32_t yes = s.type(0) == Type::kF32 ? bits<uint32_t>(1.f) : ~0u;
  s.emit([=](Warp& warp, Mask mask) {
    Mask holds = result(warp);
    uint32_t* d = to(warp);
    for_lanes(mask, [&](int lane) { d[lane] = in(holds, lane) ? yes : 0; });
  });
}

void select(Statement& s) {
  with_bits(s, [&](auto zero) {
    using T = decltype(zero);
    auto to = s.out<T>(0), a = s.in<T>(1), b = s.in<T>(2);
    Predicate which = s.predicate_in(s.operands.at(3));
    s.emit([=](Warp& warp, Mask mask) {
      T *d = to(warp), *x = a(warp), *y = b(warp);
      Mask first_ones = which.read(warp);
      T results[kLanes];
      for (int lane = 0; lane < kLanes; lane++) {
        results[lane] = in(first_ones, lane) ? x[lane] : y[lane];
      }
      write_lanes(d, results, mask);
    });
  });
}

void test_number(Statement& s) {  // testp
  Predicate to = s.predicate_out(s.operands.at(0));
  auto test = [&](auto zero) {
    using T = decltype(zero);
    auto from = s.in<T>(1);
    bool (*holds)(T) = s.has("finite")     ? [](T x) { return bool(std::isfinite(x)); }
                       : s.has("infinite") ? [](T x) { return bool(std::isinf(x)); }
                       : s.has("number")   ? [](T x) { return !std::isnan(x); }
                                           : [](T x) { return bool(std::isnan(x)); };
    if (s.has("normal") || s.has("subnormal")) s.unsupported();
    s.emit([=](Warp& warp, Mask mask) {
      const T* x = from(warp);
      Mask result = 0;
      for_lanes(mask, [&](int lane) { result |= Mask(holds(x[lane])) << lane; });
      to.write(warp, mask, result);
    });
  };
  if (s.type() == Type::kF64) return test(0.0);
  test(0.f);
}

}  // namespace

void add_comparisons(Decoders& decoders) {
  decoders["setp"] = set_predicate;
  decoders["set"] = set_value;
  decoders["selp"] = select;
  decoders["testp"] = test_number;
}

}  // namespace ptxcpu
