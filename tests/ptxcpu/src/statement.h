// An instruction's text on its way to something that can be executed. Each file of instructions
// has functions that decode a Statement, end with emit(what to execute), and are found by name.
#pragma once

#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "machine.h"

namespace ptxcpu {

enum class Type {
  kNone,
  kPredicate,
  kU8,
  kS8,
  kB8,
  kU16,
  kS16,
  kB16,
  kU32,
  kS32,
  kB32,
  kU64,
  kS64,
  kB64,
  kB128,
  kF16,
  kBF16,
  kF32,
  kF64,
  kTF32,
  kF16x2,
  kBF16x2,
};

struct TypeInfo {
  Type type;
  int width;  // bytes
};
const TypeInfo* find_type(const std::string& name);  // "u32"; nullptr: not a type

std::string trim(const std::string& text);
// At separators outside of brackets.
std::vector<std::string> split(const std::string& text, char separator);
uint64_t parse_immediate(const std::string& text);
bool is_immediate(const std::string& text);

// A value that an instruction reads: a register, or a constant in a register of its own.
struct Operand {
  uint32_t offset;
  int width;  // bytes a lane, 0: predicate
};

// The state of decoding one kernel.
class Decoder {
 public:
  Decoder(Module& module, Kernel& kernel) : module(module), kernel(kernel) {}
  void decode();

  Module& module;
  Kernel& kernel;

  Operand source(const std::string& text, int width);
  Operand destination(const std::string& text);
  Operand scratch(int width);
  Operand constant(uint64_t value, int width);
  Operand special(const std::string& name);
  Address address(const std::string& text, Space space);
  bool is_register(const std::string& name) { return find(name) != nullptr; }
  uint32_t allocate(uint32_t bytes);
  void push(Instruction instruction) { kernel.code.push_back(std::move(instruction)); }
  void branch_to(const std::string& label);        // the instruction pushed next
  void branch_to_any(const std::string& targets);  // a label of .branchtargets
  void call(const std::string& operands);          // of a function, whose body is put in place
  bool in_function() const { return calls_.size() > 1; }
  void branch_to_return() { branch_to(kReturn); }

 private:
  struct Scope {  // of names: a pair of braces
    std::map<std::string, Operand> registers;
    std::map<std::string, uint64_t> local;  // offset in a thread's local memory
  };
  static constexpr const char* kReturn = "return";  // the label behind a function
  struct Jump {
    uint32_t instruction;
    std::string label;
  };
  void body(const std::string& text);
  void statement(const std::string& text);
  void instruction(const std::string& text);
  void declare_registers(const std::string& text);
  uint64_t declare_local(const std::string& text);
  Operand* find(const std::string& name);
  const uint64_t* find_local(const std::string& name);
  std::string label_name(const std::string& label) const;

  std::vector<Scope> scopes_;
  std::map<std::string, uint32_t> shared_;  // offsets
  std::map<std::pair<uint64_t, int>, Operand> constants_;
  std::map<std::string, uint16_t> opcodes_;
  std::map<std::string, uint32_t> labels_;
  std::vector<Jump> jumps_, table_jumps_;
  std::map<std::string, std::vector<std::string>> tables_;
  std::string last_label_;
  std::vector<int> calls_;  // of functions that the statement is in: 0 is the kernel
  int number_of_calls_ = 0;
};

class Statement {
 public:
  Statement(Decoder& decoder, const std::string& text, Instruction instruction);

  Decoder& decoder;
  std::string text, opcode, name;  // "@%p ld.global.u32 ...", "ld.global.u32", "ld"
  std::vector<std::string> modifiers, operands;
  Instruction instruction;

  bool has(const std::string& modifier) const;
  Type type(int i) const;  // of those in the opcode; -1 is the last
  Type type() const { return type(-1); }
  int width() const;  // bytes of type()
  int types() const { return int(types_.size()); }
  Space space() const;

  template <class T>
  Register<T> in(int operand) {
    return in<T>(operands.at(operand));
  }
  template <class T>
  Register<T> in(const std::string& operand) {
    Operand source = decoder.source(operand, sizeof(T));
    check_width(operand, source.width, sizeof(T));
    return {source.offset};
  }
  template <class T>
  Register<T> out(int operand) {
    return out<T>(operands.at(operand));
  }
  template <class T>
  Register<T> out(const std::string& operand) {
    Operand to = operand == "_" ? decoder.scratch(sizeof(T)) : decoder.destination(operand);
    check_width(operand, to.width, sizeof(T));
    return {to.offset};
  }
  Predicate predicate_in(const std::string& operand);  // may begin with !
  Predicate predicate_out(const std::string& operand);
  // "a|b": both, or a and nothing.
  std::pair<std::string, std::string> pair(int operand) const;
  // "{a, b}" or "a"
  std::vector<std::string> elements(int operand) const;
  template <class T>
  std::vector<Register<T>> all_in(int operand) {
    std::vector<Register<T>> registers;
    for (const std::string& each : elements(operand)) registers.push_back(in<T>(each));
    return registers;
  }
  template <class T>
  std::vector<Register<T>> all_out(int operand) {
    std::vector<Register<T>> registers;
    for (const std::string& each : elements(operand)) registers.push_back(out<T>(each));
    return registers;
  }
  Address address(int operand) { return decoder.address(operands.at(operand), space()); }

  void emit(Execute execute);
  void emit_control();  // the instruction as it has been filled
  [[noreturn]] void unsupported() const { fail("unsupported PTX: " + text); }

 private:
  void check_width(const std::string& operand, int has, int wants) const;
  std::vector<TypeInfo> types_;
};

template <class T>
inline void write_lanes(T* to, const T* results, Mask mask) {
  if (mask == kAllLanes) {
    memcpy(to, results, kLanes * sizeof(T));
  } else {
    for (int lane = 0; lane < kLanes; lane++) to[lane] = in(mask, lane) ? results[lane] : to[lane];
  }
}

// destination = f(sources), lane by lane, of types D and A...
template <class D, class... A, class F>
void lanewise(Statement& s, F f, int flops = 0) {
  [&]<size_t... i>(std::index_sequence<i...>) {
    auto to = s.out<D>(0);
    std::tuple from = {s.in<A>(int(i) + 1)...};
    s.emit([=](Warp& warp, Mask mask) {
      if (flops) warp.count_flops(mask, flops);
      D results[kLanes];
      std::tuple<const A*...> a = {std::get<i>(from)(warp)...};
      for (int lane = 0; lane < kLanes; lane++) results[lane] = f(std::get<i>(a)[lane]...);
      write_lanes(to(warp), results, mask);
    });
  }(std::index_sequence_for<A...>());
}

// f(T()) with the integer type of a width and signedness.
template <class F>
void with_integer(Statement& s, F f) {
  bool is_signed = s.type() == Type::kS8 || s.type() == Type::kS16 || s.type() == Type::kS32 ||
                   s.type() == Type::kS64;
  switch (s.width()) {
    case 2: return is_signed ? f(int16_t()) : f(uint16_t());
    case 4: return is_signed ? f(int32_t()) : f(uint32_t());
    case 8: return is_signed ? f(int64_t()) : f(uint64_t());
    default: s.unsupported();
  }
}
template <class F>
void with_bits(Statement& s, F f) {
  switch (s.width()) {
    case 2: return f(uint16_t());
    case 4: return f(uint32_t());
    case 8: return f(uint64_t());
    default: s.unsupported();
  }
}

using Decode = void (*)(Statement&);
using Decoders = std::map<std::string, Decode>;
void add_arithmetic(Decoders& decoders);
void add_bits(Decoders& decoders);
void add_conversions(Decoders& decoders);
void add_comparisons(Decoders& decoders);
void add_memory(Decoders& decoders);
void add_warp_operations(Decoders& decoders);
void add_tensor_cores(Decoders& decoders);
void add_control(Decoders& decoders);
void warp_barrier(Statement& s);  // bar.warp.sync

}  // namespace ptxcpu
