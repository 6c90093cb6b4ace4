// What the lanes of a warp do together: shuffles, votes, matches, reductions, __syncwarp.
#include "statement.h"

namespace ptxcpu {
namespace {

// Reports where the lanes that execute are not those that the member mask promises.
void check_members(Warp& warp, Mask mask, const Register<uint32_t>& members,
                   const std::string& what) {
  const uint32_t* given = members(warp);
  Mask all = given[first(mask)];
  for_lanes(mask, [&](int lane) {
    if (given[lane] != all) warp.report(what + ": lanes pass different member masks");
  });
  if (mask & ~all) warp.report(what + ": a lane that executes it is not in its member mask");
  if (all & warp.live & ~mask) warp.report(what + ": member lanes have not converged");
  if (all & ~warp.live) warp.report(what + ": the member mask names exited or absent lanes");
}

enum class Shuffle { kUp, kDown, kXor, kIndex };

// shfl.sync.mode d|p, a, b, c, members. c: the width of a segment and the last lane to read from.
void shuffle(Statement& s) {
  Shuffle mode = s.has("up")     ? Shuffle::kUp
                 : s.has("down") ? Shuffle::kDown
                 : s.has("bfly") ? Shuffle::kXor
                                 : Shuffle::kIndex;
  auto [to_name, in_range_name] = s.pair(0);
  auto to = s.out<uint32_t>(to_name), from = s.in<uint32_t>(1), by = s.in<uint32_t>(2);
  auto limits = s.in<uint32_t>(3), members = s.in<uint32_t>(4);
  Predicate in_range = s.predicate_out(in_range_name);
  s.emit([=](Warp& warp, Mask mask) {
    check_members(warp, mask, members, "shfl");
    uint32_t values[kLanes];
    memcpy(values, from(warp), sizeof values);
    uint32_t *d = to(warp), *b = by(warp), *c = limits(warp);
    Mask read = 0;
    uint32_t results[kLanes];
    for_lanes(mask, [&](int lane) {
      int clamp = c[lane] & 31, segment = c[lane] >> 8 & 31, n = b[lane] & 31;
      int lowest = lane & segment, limit = lowest | (clamp & ~segment);
      int source = mode == Shuffle::kUp     ? lane - n
                   : mode == Shuffle::kDown ? lane + n
                   : mode == Shuffle::kXor  ? lane ^ n
                                            : lowest | (n & ~segment);
      if (mode == Shuffle::kUp ? source >= limit : source <= limit) {
        read |= 1u << lane;
      } else {
        source = lane;
      }
      if (!in(mask, source)) warp.report("shfl reads from a lane that does not execute it");
      results[lane] = values[source];
    });
    for_lanes(mask, [&](int lane) { d[lane] = results[lane]; });
    in_range.write(warp, mask, read);
  });
}

void vote(Statement& s) {
  Predicate from = s.predicate_in(s.operands.at(1));
  auto members = s.in<uint32_t>(2);
  if (s.has("ballot")) {
    auto to = s.out<uint32_t>(0);
    return s.emit([=](Warp& warp, Mask mask) {
      check_members(warp, mask, members, "vote");
      Mask yes = from.read(warp) & mask;
      uint32_t* d = to(warp);
      for_lanes(mask, [&](int lane) { d[lane] = yes; });
    });
  }
  bool any = s.has("any"), all = s.has("all");
  Predicate to = s.predicate_out(s.operands.at(0));
  s.emit([=](Warp& warp, Mask mask) {
    check_members(warp, mask, members, "vote");
    Mask yes = from.read(warp) & mask;
    bool holds = any ? yes != 0 : all ? yes == mask : yes == mask || yes == 0;  // uni
    to.write(warp, mask, holds ? kAllLanes : 0);
  });
}

void match(Statement& s) {  // match.any
  if (s.has("all")) s.unsupported();
  auto to = s.out<uint32_t>(0), members = s.in<uint32_t>(2);
  with_bits(s, [&](auto zero) {
    using T = decltype(zero);
    auto from = s.in<T>(1);
    s.emit([=](Warp& warp, Mask mask) {
      check_members(warp, mask, members, "match");
      uint32_t results[kLanes];
      const T* a = from(warp);
      for_lanes(mask, [&](int lane) {
        results[lane] = 0;
        for_lanes(mask, [&](int other) {
          if (a[other] == a[lane]) results[lane] |= 1u << other;
        });
      });
      uint32_t* d = to(warp);
      for_lanes(mask, [&](int lane) { d[lane] = results[lane]; });
    });
  });
}

template <class T, class F>
void reduce(Statement& s, F f) {
  auto to = s.out<T>(0), from = s.in<T>(1);
  auto members = s.in<uint32_t>(2);
  s.emit([=](Warp& warp, Mask mask) {
    check_members(warp, mask, members, "redux");
    const T* a = from(warp);
    T result = a[first(mask)];
    for_lanes(mask & (mask - 1), [&](int lane) { result = f(result, a[lane]); });
    T* d = to(warp);
    for_lanes(mask, [&](int lane) { d[lane] = result; });
  });
}

void reduction(Statement& s) {  // redux.sync
  if (s.width() != 4 || s.type() == Type::kF32) s.unsupported();
  with_integer(s, [&](auto zero) {
    using T = decltype(zero);
    if (s.has("add")) return reduce<T>(s, [](T a, T b) { return T(uint64_t(a) + uint64_t(b)); });
    if (s.has("min")) return reduce<T>(s, [](T a, T b) { return std::min(a, b); });
    if (s.has("max")) return reduce<T>(s, [](T a, T b) { return std::max(a, b); });
    if (s.has("and")) return reduce<T>(s, [](T a, T b) { return T(a & b); });
    if (s.has("or")) return reduce<T>(s, [](T a, T b) { return T(a | b); });
    reduce<T>(s, [](T a, T b) { return T(a ^ b); });
  });
}

void active_mask(Statement& s) {
  auto to = s.out<uint32_t>(0);
  s.emit([=](Warp& warp, Mask mask) {
    uint32_t* d = to(warp);
    for_lanes(mask, [&](int lane) { d[lane] = mask; });
  });
}

}  // namespace

void warp_barrier(Statement& s) {
  auto members = s.in<uint32_t>(0);
  s.emit([=](Warp& warp, Mask mask) {
    check_members(warp, mask, members, "bar.warp.sync");
    warp.clock.synchronised++;
  });
}

void add_warp_operations(Decoders& decoders) {
  decoders["shfl"] = shuffle;
  decoders["vote"] = vote;
  decoders["match"] = match;
  decoders["redux"] = reduction;
  decoders["activemask"] = active_mask;
}

}  // namespace ptxcpu
