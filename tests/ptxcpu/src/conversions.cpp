// cvt and cvta.
#include "statement.h"

namespace ptxcpu {
namespace {

enum class Rounding { kNearest, kZero, kDown, kUp };

Rounding rounding(const Statement& s) {
  if (s.has("rz") || s.has("rzi")) return Rounding::kZero;
  if (s.has("rm") || s.has("rmi")) return Rounding::kDown;
  if (s.has("rp") || s.has("rpi")) return Rounding::kUp;
  return Rounding::kNearest;
}

double round_to_integer(double x, Rounding how) {
  switch (how) {
    case Rounding::kZero: return std::trunc(x);
    case Rounding::kDown: return std::floor(x);
    case Rounding::kUp: return std::ceil(x);
    default: return std::nearbyint(x);
  }
}

bool is_float(Type type) {
  return type == Type::kF16 || type == Type::kBF16 || type == Type::kF32 || type == Type::kF64;
}
bool is_signed(Type type) {
  return type == Type::kS8 || type == Type::kS16 || type == Type::kS32 || type == Type::kS64;
}
int type_bits(Type type) {
  switch (type) {
    case Type::kU8:
    case Type::kS8:
    case Type::kB8: return 8;
    case Type::kU16:
    case Type::kS16:
    case Type::kB16:
    case Type::kF16:
    case Type::kBF16: return 16;
    case Type::kU64:
    case Type::kS64:
    case Type::kB64:
    case Type::kF64: return 64;
    default: return 32;
  }
}

// Sign- or zero-extended from the type's bits.
int64_t extend(uint64_t raw, Type type) {
  int unused = 64 - type_bits(type);
  return is_signed(type) ? int64_t(raw << unused) >> unused : int64_t(raw << unused >> unused);
}

double read_float(uint64_t raw, Type type) {
  switch (type) {
    case Type::kF16: return from_half(uint16_t(raw));
    case Type::kBF16: return from_bfloat16(uint16_t(raw));
    case Type::kF32: return bits<float>(uint32_t(raw));
    default: return bits<double>(raw);
  }
}

uint16_t write_sixteen_bits(double x, bool bfloat16, Rounding how) {
  uint16_t nearest = bfloat16 ? to_bfloat16(x) : to_half(x);
  if (how != Rounding::kZero) return nearest;
  return towards_zero(nearest, bfloat16 ? from_bfloat16(nearest) : from_half(nearest), x);
}

uint64_t write_float(double x, Type type, Rounding how) {
  switch (type) {
    case Type::kF16: return write_sixteen_bits(x, false, how);
    case Type::kBF16: return write_sixteen_bits(x, true, how);
    case Type::kF64: return bits<uint64_t>(x);
    default: {
      float nearest = float(x);
      bool away = std::fabs(double(nearest)) > std::fabs(x);
      if (how == Rounding::kZero && away) nearest = std::nextafter(nearest, 0.f);
      return bits<uint32_t>(nearest);
    }
  }
}

uint64_t float_to_integer(double x, Type type, Rounding how) {
  int width = type_bits(type);
  double low = is_signed(type) ? -std::ldexp(1.0, width - 1) : 0;
  double high = std::ldexp(1.0, is_signed(type) ? width - 1 : width);
  double rounded = round_to_integer(x, how);
  if (std::isnan(rounded)) return 0;
  if (rounded <= low) return uint64_t(int64_t(low));
  if (rounded >= high) return is_signed(type) ? (1ull << (width - 1)) - 1 : ~0ull >> (64 - width);
  return is_signed(type) ? uint64_t(int64_t(rounded)) : uint64_t(rounded);
}

uint64_t saturate_integer(int64_t x, Type from, Type to) {
  int width = type_bits(to);
  bool huge = !is_signed(from) && x < 0;  // an unsigned number of 64 bits
  if (is_signed(to)) {
    int64_t limit = int64_t(~0ull >> (65 - width));
    return huge ? limit : std::clamp(x, -limit - 1, limit);
  }
  if (!huge && x < 0) return 0;
  return std::min<uint64_t>(x, ~0ull >> (64 - width));
}

struct Conversion {
  Type from, to;
  Rounding how;
  bool flush, saturated, relu, to_integral;

  uint64_t operator()(uint64_t raw) const {
    if (is_float(from)) {
      double x = read_float(raw, from);
      if (flush && from == Type::kF32) x = flush_denormal(float(x));
      if (!is_float(to) && to != Type::kTF32) return float_to_integer(x, to, how);
      if (to_integral) x = round_to_integer(x, how);
      if (relu) x = x > 0 ? x : 0;
      if (saturated) x = saturate(x);
      if (to == Type::kTF32) return to_tf32(float(x));
      uint64_t result = write_float(x, to, to_integral ? Rounding::kNearest : how);
      if (flush && to == Type::kF32)
        return bits<uint32_t>(flush_denormal(bits<float>(uint32_t(result))));
      return result;
    }
    int64_t x = extend(raw, from);
    if (is_float(to)) {
      if (to == Type::kF32 && how == Rounding::kNearest) {  // rounded once
        return bits<uint32_t>(is_signed(from) ? float(x) : float(uint64_t(x)));
      }
      return write_float(is_signed(from) ? double(x) : double(uint64_t(x)), to, how);
    }
    return saturated ? saturate_integer(x, from, to) : uint64_t(extend(uint64_t(x), to));
  }
};

void convert_general(Statement& s, Conversion conversion) {
  Operand to = s.decoder.destination(s.operands.at(0));
  Operand from = s.decoder.source(s.operands.at(1), s.width());
  s.emit([=](Warp& warp, Mask mask) {
    uint8_t* d = warp.registers + to.offset;
    const uint8_t* a = warp.registers + from.offset;
    for_lanes(mask, [&](int lane) {
      uint64_t raw = 0;
      memcpy(&raw, a + lane * from.width, from.width);
      uint64_t result = conversion(raw);
      memcpy(d + lane * to.width, &result, to.width);
    });
  });
}

// cvt.bf16x2.f32 d, high, low
template <bool bfloat16>
void convert_two(Statement& s) {
  bool relu = s.has("relu");
  if (s.has("rz")) {
    return lanewise<uint32_t, float, float>(s, [=](float high, float low) {
      auto one = [=](float x) {
        return uint32_t(write_sixteen_bits(relu && !(x > 0) ? 0 : x, bfloat16, Rounding::kZero));
      };
      return one(high) << 16 | one(low);
    });
  }
  lanewise<uint32_t, float, float>(s, [=](float high, float low) {
    auto one = [=](float x) {
      double value = relu && !(x > 0) ? 0 : x;
      return uint32_t(bfloat16 ? to_bfloat16(value) : to_half(value));
    };
    return one(high) << 16 | one(low);
  });
}

void convert(Statement& s) {
  if (s.types() != 2) s.unsupported();
  Type to = s.type(0), from = s.type(1);
  if (to == Type::kF16x2 || to == Type::kBF16x2) {
    if (from != Type::kF32) s.unsupported();
    return to == Type::kBF16x2 ? convert_two<true>(s) : convert_two<false>(s);
  }
  for (Type type : {from, to}) {
    if (type == Type::kPredicate || type == Type::kB128) s.unsupported();
  }
  if (from == Type::kTF32 || from == Type::kF16x2 || from == Type::kBF16x2) s.unsupported();
  if (to == Type::kTF32 && !(s.has("rna") && from == Type::kF32)) s.unsupported();
  Rounding how = rounding(s);
  if ((how == Rounding::kDown || how == Rounding::kUp) && (s.has("rm") || s.has("rp"))) {
    s.unsupported();
  }
  bool plain = !s.has("ftz") && !s.has("sat") && !s.has("relu") && how == Rounding::kNearest &&
               !s.has("rni");
  if (plain && to == Type::kF32 && from == Type::kBF16)
    return lanewise<float, uint16_t>(s, from_bfloat16);
  if (plain && to == Type::kF32 && from == Type::kF16)
    return lanewise<float, uint16_t>(s, from_half);
  if (plain && to == Type::kBF16 && from == Type::kF32)
    return lanewise<uint16_t, float>(s, [](float x) { return to_bfloat16(x); });
  if (plain && to == Type::kF16 && from == Type::kF32)
    return lanewise<uint16_t, float>(s, [](float x) { return to_half(x); });
  bool to_integral = s.has("rni") || s.has("rzi") || s.has("rmi") || s.has("rpi");
  convert_general(s, {from, to, how, s.has("ftz"), s.has("sat"), s.has("relu"), to_integral});
}

// Generic addresses are the host's; those of shared memory and parameters begin at 0.
void convert_address(Statement& s) {
  bool to_space = s.has("to");
  Space space = s.space();
  auto origin = [space](const Warp& warp) {
    return space == Space::kShared      ? uint64_t(warp.block->shared)
           : space == Space::kParameter ? uint64_t(warp.launch->parameters.data())
                                        : 0;
  };
  Operand from = s.decoder.source(s.operands.at(1), s.width());
  if (from.width != 8 || s.width() != 8) s.unsupported();
  auto to = s.out<uint64_t>(0);
  s.emit([=](Warp& warp, Mask mask) {
    uint64_t* d = to(warp);
    const uint64_t* a = Register<uint64_t>{from.offset}(warp);
    uint64_t offset = to_space ? -origin(warp) : origin(warp);
    for_lanes(mask, [&](int lane) { d[lane] = a[lane] + offset; });
  });
}

void is_space(Statement& s) {  // isspacep
  Space space = s.space();
  auto from = s.in<uint64_t>(1);
  Predicate to = s.predicate_out(s.operands.at(0));
  s.emit([=](Warp& warp, Mask mask) {
    const uint64_t* a = from(warp);
    Mask result = 0;
    for_lanes(mask, [&](int lane) {
      bool shared = warp.block->owns_shared(a[lane]), local = warp.block->owns_local(a[lane]);
      bool parameter = warp.block->owns_parameters(a[lane]);
      bool holds = space == Space::kShared      ? shared
                   : space == Space::kLocal     ? local
                   : space == Space::kParameter ? parameter
                                                : !shared && !local && !parameter;
      result |= Mask(holds) << lane;
    });
    to.write(warp, mask, result);
  });
}

}  // namespace

void add_conversions(Decoders& decoders) {
  decoders["cvt"] = convert;
  decoders["cvta"] = convert_address;
  decoders["isspacep"] = is_space;
}

}  // namespace ptxcpu
