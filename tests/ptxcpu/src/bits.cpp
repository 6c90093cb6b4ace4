// Moves, logic, shifts and bit fields.
#include "statement.h"

namespace ptxcpu {
namespace {

// ---- mov ----

void pack(Statement& s) {  // mov.b64 d, {a, b}
  auto to = s.decoder.destination(s.operands[0]);
  size_t parts = s.elements(1).size();
  uint32_t part = s.width() / parts;
  std::vector<uint32_t> from;
  for (const std::string& each : s.elements(1)) {
    Operand source = s.decoder.source(each, part);
    if (source.width != int(part)) s.unsupported();
    from.push_back(source.offset);
  }
  s.emit([=](Warp& warp, Mask mask) {
    for (size_t i = 0; i < parts; i++) {
      const uint8_t* source = warp.registers + from[i];
      uint8_t* destination = warp.registers + to.offset + i * part;
      for_lanes(mask, [&](int lane) {
        memcpy(destination + lane * part * parts, source + lane * part, part);
      });
    }
  });
}

void unpack(Statement& s) {  // mov.b64 {d, e}, a
  std::vector<uint32_t> to;
  size_t parts = s.elements(0).size();
  uint32_t part = s.width() / parts;
  for (const std::string& each : s.elements(0)) {
    Operand place = each == "_" ? s.decoder.scratch(part) : s.decoder.destination(each);
    if (place.width != int(part)) s.unsupported();
    to.push_back(place.offset);
  }
  uint32_t from = s.decoder.source(s.operands[1], s.width()).offset;
  s.emit([=](Warp& warp, Mask mask) {
    // the source may be one of the destinations
    uint8_t source[kLanes * 16];
    memcpy(source, warp.registers + from, kLanes * part * parts);
    for (size_t i = 0; i < parts; i++) {
      uint8_t* destination = warp.registers + to[i];
      for_lanes(mask, [&](int lane) {
        memcpy(destination + lane * part, source + (lane * parts + i) * part, part);
      });
    }
  });
}

template <class T>
void read_clock(Statement& s) {
  auto to = s.out<T>(0);
  s.emit([=](Warp& warp, Mask mask) {
    T* d = to(warp);
    T now = T(warp.launch->statistics.warp_instructions);
    for_lanes(mask, [&](int lane) { d[lane] = now; });
  });
}

void move(Statement& s) {
  if (s.operands.at(0)[0] == '{') return unpack(s);
  if (s.operands.at(1)[0] == '{') return pack(s);
  if (s.type() == Type::kPredicate) {
    Predicate to = s.predicate_out(s.operands[0]), from = s.predicate_in(s.operands[1]);
    return s.emit([=](Warp& warp, Mask mask) { to.write(warp, mask, from.read(warp)); });
  }
  if (s.operands[1].rfind("%clock", 0) == 0 || s.operands[1].rfind("%globaltimer", 0) == 0) {
    return s.width() == 8 ? read_clock<uint64_t>(s) : read_clock<uint32_t>(s);
  }
  if (s.width() == 8 && s.decoder.source(s.operands[1], 8).width == 4) {  // special registers
    return lanewise<uint64_t, uint32_t>(s, [](uint32_t a) { return a; });
  }
  with_bits(s, [&](auto zero) {
    using T = decltype(zero);
    lanewise<T, T>(s, [](T a) { return a; });
  });
}

// ---- logic ----

template <class F>
void predicate_logic(Statement& s, F f) {
  Predicate to = s.predicate_out(s.operands.at(0)), a = s.predicate_in(s.operands.at(1));
  Predicate b = s.predicate_in(s.operands.back());
  s.emit([=](Warp& warp, Mask mask) { to.write(warp, mask, f(a.read(warp), b.read(warp))); });
}

template <class F>
void binary_logic(Statement& s, F f) {
  if (s.type() == Type::kPredicate) return predicate_logic(s, f);
  with_bits(s, [&](auto zero) {
    using T = decltype(zero);
    lanewise<T, T, T>(s, [f](T a, T b) { return T(f(a, b)); });
  });
}

void logic_and(Statement& s) {
  binary_logic(s, [](auto a, auto b) { return a & b; });
}
void logic_or(Statement& s) {
  binary_logic(s, [](auto a, auto b) { return a | b; });
}
void logic_xor(Statement& s) {
  binary_logic(s, [](auto a, auto b) { return a ^ b; });
}

void logic_not(Statement& s) {
  if (s.type() == Type::kPredicate) return predicate_logic(s, [](Mask a, Mask) { return ~a; });
  with_bits(s, [&](auto zero) {
    using T = decltype(zero);
    lanewise<T, T>(s, [](T a) { return T(~a); });
  });
}

void logic_of_three(Statement& s) {  // lop3: a truth table
  if (!is_immediate(s.operands.back()) || s.operands.size() != 5) s.unsupported();
  uint32_t table = uint32_t(parse_immediate(s.operands.back()));
  lanewise<uint32_t, uint32_t, uint32_t, uint32_t>(s, [=](uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    for (int i = 0; i < 8; i++) {
      uint32_t row = (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
      result |= table >> i & 1 ? row : 0;
    }
    return result;
  });
}

// ---- shifts and fields ----

void shift_left(Statement& s) {
  with_bits(s, [&](auto zero) {
    using T = decltype(zero);
    lanewise<T, T, uint32_t>(
        s, [](T a, uint32_t by) { return by >= 8 * sizeof(T) ? T(0) : T(a << by); });
  });
}

void shift_right(Statement& s) {
  with_integer(s, [&](auto zero) {
    using T = decltype(zero);
    lanewise<T, T, uint32_t>(s, [](T a, uint32_t by) {
      constexpr uint32_t last = 8 * sizeof(T) - 1;
      if (by > last) return T(T(-1) < 0 ? a >> last : 0);
      return T(a >> by);
    });
  });
}

void funnel_shift(Statement& s) {  // shf
  bool right = s.has("r"), clamp = s.has("clamp");
  lanewise<uint32_t, uint32_t, uint32_t, uint32_t>(
      s, [=](uint32_t low, uint32_t high, uint32_t by) {
        uint32_t n = clamp ? std::min(by, 32u) : by & 31;
        uint64_t both = low | uint64_t(high) << 32;
        return uint32_t(right ? both >> n : both << n >> 32);
      });
}

template <class T>
T ones(uint32_t n) {
  return n >= 8 * sizeof(T) ? T(-1) : T((T(1) << n) - 1);
}

template <class T>
T extract_field(T a, uint32_t position, uint32_t length) {
  using U = std::make_unsigned_t<T>;
  constexpr uint32_t kBits = 8 * sizeof(T);
  position &= 255;
  length &= 255;
  if (length == 0) return 0;
  U field = position < kBits ? U(U(a) >> position) & ones<U>(length) : U(0);
  if (T(-1) < 0) {
    bool negative = U(a) >> std::min(position + length - 1, kBits - 1) & 1;
    uint32_t have = position < kBits ? std::min(length, kBits - position) : 0;
    if (negative) field |= U(~ones<U>(have));
  }
  return T(field);
}

void bit_field_extract(Statement& s) {
  with_integer(s, [&](auto zero) {
    using T = decltype(zero);
    lanewise<T, T, uint32_t, uint32_t>(s, extract_field<T>);
  });
}

void bit_field_insert(Statement& s) {
  with_bits(s, [&](auto zero) {
    using T = decltype(zero);
    lanewise<T, T, T, uint32_t, uint32_t>(s, [](T a, T b, uint32_t position, uint32_t length) {
      position &= 255;
      if (position >= 8 * sizeof(T)) return b;
      T field = T(ones<T>(length & 255) << position);
      return T((b & ~field) | (T(a << position) & field));
    });
  });
}

void permute_bytes(Statement& s) {
  if (s.modifiers.size() > 1) s.unsupported();
  lanewise<uint32_t, uint32_t, uint32_t, uint32_t>(
      s, [](uint32_t low, uint32_t high, uint32_t selectors) {
        uint64_t bytes = low | uint64_t(high) << 32;
        uint32_t result = 0;
        for (int i = 0; i < 4; i++) {
          uint32_t selector = selectors >> 4 * i & 15;
          uint32_t byte = bytes >> 8 * (selector & 7) & 255;
          if (selector & 8) byte = byte & 128 ? 255 : 0;  // its sign
          result |= byte << 8 * i;
        }
        return result;
      });
}

template <class F>
void count_bits(Statement& s, F f) {
  if (s.width() == 8) {
    lanewise<uint32_t, uint64_t>(s, [f](uint64_t a) { return uint32_t(f(a, 64)); });
  } else {
    lanewise<uint32_t, uint32_t>(s, [f](uint32_t a) { return uint32_t(f(a, 32)); });
  }
}
void population_count(Statement& s) {
  count_bits(s, [](uint64_t a, int) { return __builtin_popcountll(a); });
}
void leading_zeros(Statement& s) {
  count_bits(s, [](uint64_t a, int bits) { return a ? __builtin_clzll(a) - (64 - bits) : bits; });
}

void find_leading_one(Statement& s) {  // bfind of unsigned numbers
  if (s.type() != Type::kU32 && s.type() != Type::kU64) s.unsupported();
  bool shift = s.has("shiftamt");
  count_bits(s, [shift](uint64_t a, int bits) {
    if (!a) return -1;
    int position = 63 - __builtin_clzll(a);
    return shift ? bits - 1 - position : position;
  });
}

template <class T>
T reverse_bits(T a) {
  T result = 0;
  for (size_t i = 0; i < 8 * sizeof(T); i++) result |= (a >> i & 1) << (8 * sizeof(T) - 1 - i);
  return result;
}
void bit_reverse(Statement& s) {
  if (s.width() == 8) return lanewise<uint64_t, uint64_t>(s, reverse_bits<uint64_t>);
  lanewise<uint32_t, uint32_t>(s, reverse_bits<uint32_t>);
}

}  // namespace

void add_bits(Decoders& decoders) {
  decoders["mov"] = move;
  decoders["and"] = logic_and;
  decoders["or"] = logic_or;
  decoders["xor"] = logic_xor;
  decoders["not"] = logic_not;
  decoders["lop3"] = logic_of_three;
  decoders["shl"] = shift_left;
  decoders["shr"] = shift_right;
  decoders["shf"] = funnel_shift;
  decoders["bfe"] = bit_field_extract;
  decoders["bfi"] = bit_field_insert;
  decoders["bfind"] = find_leading_one;
  decoders["prmt"] = permute_bytes;
  decoders["popc"] = population_count;
  decoders["clz"] = leading_zeros;
  decoders["brev"] = bit_reverse;
}

}  // namespace ptxcpu
