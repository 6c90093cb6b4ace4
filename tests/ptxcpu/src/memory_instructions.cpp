// Loads, stores, atomics, cp.async, ldmatrix and stmatrix.
#include "statement.h"

namespace ptxcpu {
namespace {

template <class T>
void copy_lanes(Mask mask, T* to, uint8_t** places, uint32_t offset) {
  for_lanes(mask, [&](int lane) { memcpy(&to[lane], places[lane] + offset, sizeof(T)); });
}

void load(Statement& s) {
  uint32_t width = s.width();
  bool is_signed = s.type() == Type::kS8 || s.type() == Type::kS16 || s.type() == Type::kS32;
  std::vector<Operand> to;
  for (const std::string& each : s.elements(0)) {
    to.push_back(each == "_" ? s.decoder.scratch(std::max(width, 2u))
                             : s.decoder.destination(each));
  }
  Address address = s.address(1);
  s.emit([=](Warp& warp, Mask mask) {
    uint8_t* places[kLanes];
    if (!resolve(warp, address, width * uint32_t(to.size()), Use::kLoad, mask, places)) return;
    uint32_t offset = 0;
    for (const Operand& each : to) {
      if (width == 4 && each.width == 4) {
        copy_lanes(mask, Register<uint32_t>{each.offset}(warp), places, offset);
      } else if (width == 8 && each.width == 8) {
        copy_lanes(mask, Register<uint64_t>{each.offset}(warp), places, offset);
      } else {  // into a wider register
        uint8_t* d = warp.registers + each.offset;
        for_lanes(mask, [&](int lane) {
          uint64_t value[2] = {};
          memcpy(value, places[lane] + offset, width);
          int unused = 64 - 8 * int(width);
          if (is_signed) value[0] = uint64_t(int64_t(value[0] << unused) >> unused);
          memcpy(d + lane * each.width, value, each.width);
        });
      }
      offset += width;
    }
  });
}

void store(Statement& s) {
  uint32_t width = s.width();
  std::vector<Operand> from;
  for (const std::string& each : s.elements(1)) from.push_back(s.decoder.source(each, width));
  Address address = s.address(0);
  s.emit([=](Warp& warp, Mask mask) {
    uint8_t* places[kLanes];
    if (!resolve(warp, address, width * uint32_t(from.size()), Use::kStore, mask, places)) return;
    uint32_t offset = 0;
    for (const Operand& each : from) {
      const uint8_t* a = warp.registers + each.offset;
      for_lanes(mask,
                [&](int lane) { memcpy(places[lane] + offset, a + lane * each.width, width); });
      offset += width;
    }
  });
}

// ---- atom and red ----

// What is stored where `old` was; b: the third operand of cas.
template <class T>
T atomic_result(const std::string& operation, T old, T a, T b) {
  if (operation == "add") return T(old + a);
  if (operation == "min") return old < a ? old : a;
  if (operation == "max") return old > a ? old : a;
  if (operation == "exch") return a;
  if (operation == "cas") return old == a ? b : old;
  if constexpr (std::is_integral_v<T>) {
    if (operation == "and") return old & a;
    if (operation == "or") return old | a;
    if (operation == "xor") return old ^ a;
    if (operation == "inc") return old >= a ? 0 : old + 1;
    if (operation == "dec") return old == 0 || old > a ? a : old - 1;
  }
  fail("atomic " + operation);
}

double half_value(uint16_t x) { return from_half(x); }
double bfloat16_value(uint16_t x) { return from_bfloat16(x); }

template <class T, class F>
void atomic_of(Statement& s, F result) {
  bool returns = s.name == "atom";
  int first_operand = returns ? 1 : 0;
  Register<T> to;
  if (returns) to = s.out<T>(0);
  auto a = s.in<T>(first_operand + 1);
  bool has_second = int(s.operands.size()) > first_operand + 2;
  auto b = has_second ? s.in<T>(first_operand + 2) : a;
  Address address = s.address(first_operand);
  s.emit([=](Warp& warp, Mask mask) {
    uint8_t* places[kLanes];
    if (!resolve(warp, address, sizeof(T), Use::kAtomic, mask, places)) return;
    warp.launch->statistics.atomics += count(mask);
    T *x = a(warp), *y = b(warp);
    for_lanes(mask, [&](int lane) {
      T old;
      memcpy(&old, places[lane], sizeof old);
      T updated = result(old, x[lane], y[lane]);
      memcpy(places[lane], &updated, sizeof updated);
      if (returns) to(warp)[lane] = old;
    });
  });
}

void atomic(Statement& s) {
  if (s.opcode.find(".v2") != std::string::npos || s.opcode.find(".v4") != std::string::npos) {
    s.unsupported();
  }
  std::string operation;
  for (const char* each : {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"}) {
    if (s.has(each)) operation = each;
  }
  auto same_type = [&](auto zero) {
    using T = decltype(zero);
    atomic_of<T>(s, [=](T old, T a, T b) { return atomic_result(operation, old, a, b); });
  };
  auto sixteen = [&](double (*read)(uint16_t), uint16_t (*write)(double)) {
    auto one = [=](uint16_t old, uint16_t a) {
      return write(atomic_result(operation, read(old), read(a), 0.0));
    };
    if (s.width() == 2) {
      atomic_of<uint16_t>(s, [=](uint16_t old, uint16_t a, uint16_t) { return one(old, a); });
    } else {
      atomic_of<uint32_t>(s, [=](uint32_t old, uint32_t a, uint32_t) {
        return one(uint16_t(old), uint16_t(a)) |
               uint32_t(one(uint16_t(old >> 16), uint16_t(a >> 16))) << 16;
      });
    }
  };
  if (operation.empty()) s.unsupported();
  switch (s.type()) {
    case Type::kF32: return same_type(0.f);
    case Type::kF64: return same_type(0.0);
    case Type::kF16:
    case Type::kF16x2: return sixteen(half_value, to_half);
    case Type::kBF16:
    case Type::kBF16x2: return sixteen(bfloat16_value, to_bfloat16);
    default: with_integer(s, same_type);
  }
}

// ---- cp.async ----

// cp.async.ca.shared.global [destination], [source], size{, bytes}
void async_copy(Statement& s) {
  if (!s.has("async") || s.has("bulk") || s.has("mbarrier")) s.unsupported();
  if (s.has("commit_group")) return s.emit([](Warp& warp, Mask) { warp.copies.commit(); });
  if (s.has("wait_all")) return s.emit([](Warp& warp, Mask) { warp.copies.wait_all(warp); });
  if (s.has("wait_group")) {
    size_t left = parse_immediate(s.operands.at(0));
    return s.emit([=](Warp& warp, Mask) { warp.copies.wait(warp, left); });
  }
  Address destination = s.decoder.address(s.operands.at(0), Space::kShared);
  Address source = s.decoder.address(s.operands.at(1), Space::kGlobal);
  uint32_t size = uint32_t(parse_immediate(s.operands.at(2)));
  bool cache_policy = s.has("L2::cache_hint");
  bool partial = s.operands.size() > (cache_policy ? 4 : 3);
  Register<uint32_t> bytes;
  Predicate ignore;
  if (partial) {
    const std::string& fourth = s.operands[3];
    if (s.decoder.source(fourth, 4).width == 0) {
      ignore = s.predicate_in(fourth);
    } else {
      bytes = s.in<uint32_t>(fourth);
    }
  }
  s.emit([=](Warp& warp, Mask mask) {
    uint64_t to[kLanes], from[kLanes];
    destination.read(warp, to);
    source.read(warp, from);
    Block& block = *warp.block;
    const Options& options = warp.launch->configuration.options;
    uint32_t offsets[kLanes] = {};
    Mask reading = 0;
    for_lanes(mask, [&](int lane) {
      uint32_t wanted = size;
      if (bytes.offset != kNoRegister) wanted = std::min(bytes(warp)[lane], size);
      if (ignore.offset != kNoRegister && in(ignore.read(warp), lane)) wanted = 0;
      offsets[lane] = uint32_t(to[lane]);
      if (!check_shared(warp, to[lane], size, size, "destination of cp.async")) {
        mask &= ~(1u << lane);
        return;
      }
      if (wanted && !check_global(warp, from[lane], wanted, 1, "source of cp.async")) return;
      if (from[lane] % size) warp.report("misaligned global source of cp.async");
      if (wanted) reading |= 1u << lane;
      if (options.check) block.checks.begin_copy(warp, lane, offsets[lane], size);
      warp.copies.start({lane, offsets[lane], size, wanted, from[lane]});
    });
    if (!options.statistics || !mask) return;
    count_shared(warp.launch->statistics, offsets, size, mask);
    if (reading) count_global(warp, from, size, reading, false);
  });
}

// ---- ldmatrix, stmatrix: 8x8 matrices of 16-bit numbers ----

struct Matrix {
  uint16_t at[8][8];
};
// Lane 4 g + q holds row g, columns 2 q and 2 q + 1; transposed: column g, rows 2 q and 2 q + 1.
void matrix_to_lanes(const Matrix& matrix, bool transposed, uint32_t* lanes) {
  for (int lane = 0; lane < kLanes; lane++) {
    int g = lane / 4, q = lane % 4;
    uint16_t low = transposed ? matrix.at[2 * q][g] : matrix.at[g][2 * q];
    uint16_t high = transposed ? matrix.at[2 * q + 1][g] : matrix.at[g][2 * q + 1];
    lanes[lane] = low | uint32_t(high) << 16;
  }
}
void lanes_to_matrix(const uint32_t* lanes, bool transposed, Matrix& matrix) {
  for (int lane = 0; lane < kLanes; lane++) {
    int g = lane / 4, q = lane % 4;
    (transposed ? matrix.at[2 * q][g] : matrix.at[g][2 * q]) = uint16_t(lanes[lane]);
    (transposed ? matrix.at[2 * q + 1][g] : matrix.at[g][2 * q + 1]) = lanes[lane] >> 16;
  }
}

void load_or_store_matrix(Statement& s) {
  bool load = s.name == "ldmatrix";
  if (!s.has("b16") || !s.has("m8n8")) s.unsupported();
  bool transposed = s.has("trans");
  auto registers = load ? s.all_out<uint32_t>(0) : s.all_in<uint32_t>(1);
  Address address = s.address(load ? 1 : 0);
  s.emit([=](Warp& warp, Mask mask) {
    warp.require_whole(mask, load ? "ldmatrix" : "stmatrix");
    Block& block = *warp.block;
    const Options& options = warp.launch->configuration.options;
    uint64_t addresses[kLanes];
    address.read(warp, addresses);
    uint64_t origin = address.space == Space::kGeneric ? uint64_t(block.shared) : 0;
    for (size_t i = 0; i < registers.size(); i++) {
      Matrix matrix = {};
      uint32_t offsets[kLanes] = {};
      Mask rows = 0;
      if (!load) lanes_to_matrix(registers[i](warp), transposed, matrix);
      for (int row = 0; row < 8; row++) {
        int lane = int(i) * 8 + row;  // its address
        uint64_t offset = addresses[lane] - origin;
        if (!check_shared(warp, offset, 16, 16, "row of a matrix")) continue;
        offsets[row] = uint32_t(offset);
        rows |= 1u << row;
        uint8_t* place = block.shared + offset;
        if (load) {
          if (options.check) block.checks.read(warp, lane, offsets[row], 16);
          memcpy(matrix.at[row], place, 16);
        } else {
          if (options.check) block.checks.write(warp, lane, offsets[row], 16);
          memcpy(place, matrix.at[row], 16);
        }
      }
      if (load) matrix_to_lanes(matrix, transposed, registers[i](warp));
      if (options.statistics && rows) {
        count_shared(warp.launch->statistics, offsets, 16, rows);
      }
    }
  });
}

void transpose_matrix(Statement& s) {  // movmatrix
  auto to = s.out<uint32_t>(0), from = s.in<uint32_t>(1);
  s.emit([=](Warp& warp, Mask mask) {
    warp.require_whole(mask, "movmatrix");
    Matrix matrix;
    lanes_to_matrix(from(warp), false, matrix);
    matrix_to_lanes(matrix, true, to(warp));
  });
}

}  // namespace

void add_memory(Decoders& decoders) {
  decoders["ld"] = decoders["ldu"] = load;
  decoders["st"] = store;
  decoders["atom"] = decoders["red"] = atomic;
  decoders["cp"] = async_copy;
  decoders["ldmatrix"] = decoders["stmatrix"] = load_or_store_matrix;
  decoders["movmatrix"] = transpose_matrix;
}

}  // namespace ptxcpu
