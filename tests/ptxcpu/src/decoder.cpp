#include <sstream>

#include "declaration.h"
#include "statement.h"

namespace ptxcpu {
namespace {

const std::map<std::string, TypeInfo> kTypes = {
    {"pred", {Type::kPredicate, 0}}, {"u8", {Type::kU8, 1}},       {"s8", {Type::kS8, 1}},
    {"b8", {Type::kB8, 1}},          {"u16", {Type::kU16, 2}},     {"s16", {Type::kS16, 2}},
    {"b16", {Type::kB16, 2}},        {"u32", {Type::kU32, 4}},     {"s32", {Type::kS32, 4}},
    {"b32", {Type::kB32, 4}},        {"u64", {Type::kU64, 8}},     {"s64", {Type::kS64, 8}},
    {"b64", {Type::kB64, 8}},        {"b128", {Type::kB128, 16}},  {"f16", {Type::kF16, 2}},
    {"bf16", {Type::kBF16, 2}},      {"f32", {Type::kF32, 4}},     {"f64", {Type::kF64, 8}},
    {"tf32", {Type::kTF32, 4}},      {"f16x2", {Type::kF16x2, 4}}, {"bf16x2", {Type::kBF16x2, 4}},
};

const Decoders& decoders() {
  static const Decoders all = [] {
    Decoders collected;
    add_arithmetic(collected);
    add_bits(collected);
    add_conversions(collected);
    add_comparisons(collected);
    add_memory(collected);
    add_warp_operations(collected);
    add_tensor_cores(collected);
    add_control(collected);
    return collected;
  }();
  return all;
}

uint32_t round_up(uint32_t x, uint32_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

bool begins_with(const std::string& text, const char* beginning) {
  return text.compare(0, strlen(beginning), beginning) == 0;
}

std::string braceless(const std::string& text) { return text.substr(1, text.size() - 2); }

}  // namespace

const TypeInfo* find_type(const std::string& name) {
  auto it = kTypes.find(name);
  return it == kTypes.end() ? nullptr : &it->second;
}

std::string trim(const std::string& text) {
  size_t begin = text.find_first_not_of(" \t\r\n"), end = text.find_last_not_of(" \t\r\n");
  return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (char each : text) {
    if (strchr("{[(", each)) depth++;
    if (strchr("}])", each)) depth--;
    if (each == separator && depth == 0) {
      parts.push_back(trim(part));
      part.clear();
    } else {
      part += each;
    }
  }
  if (!trim(part).empty()) parts.push_back(trim(part));
  return parts;
}

bool is_immediate(const std::string& text) {
  size_t digit = text[0] == '-' || text[0] == '+';
  return digit < text.size() && isdigit(text[digit]);
}

// 12, -3, 0x1f, 0f3f800000 (float), 0d3ff0000000000000 (double)
uint64_t parse_immediate(const std::string& text) {
  if (begins_with(text, "0f") || begins_with(text, "0F") || begins_with(text, "0d") ||
      begins_with(text, "0D")) {
    return strtoull(text.c_str() + 2, nullptr, 16);
  }
  if (text[0] == '-') return -strtoull(text.c_str() + 1, nullptr, 0);
  return strtoull(text.c_str(), nullptr, 0);
}

uint32_t Decoder::allocate(uint32_t bytes) {
  uint32_t offset = round_up(kernel.register_bytes, 64);
  kernel.register_bytes = offset + bytes;
  return offset;
}

Operand Decoder::scratch(int width) { return {allocate(width ? kLanes * width : 4), width}; }

Operand Decoder::constant(uint64_t value, int width) {
  if (width < 8) value &= (1ull << 8 * std::max(width, 1)) - 1;
  auto [it, added] = constants_.try_emplace({value, width});
  if (added) {
    it->second = scratch(width);
    kernel.constants.push_back({it->second.offset, width, value});
  }
  return it->second;
}

Operand Decoder::special(const std::string& name) {
  int width = name == "%local" || name == "%gridid" ? 8 : 4;
  auto [it, added] = kernel.specials.try_emplace(name);
  if (added) it->second = scratch(width).offset;
  return {it->second, width};
}

Operand* Decoder::find(const std::string& name) {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    auto it = scope->registers.find(name);
    if (it != scope->registers.end()) return &it->second;
  }
  return nullptr;
}

const uint64_t* Decoder::find_local(const std::string& name) {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    auto it = scope->local.find(name);
    if (it != scope->local.end()) return &it->second;
  }
  return nullptr;
}

Operand Decoder::source(const std::string& text, int width) {
  if (Operand* found = find(text)) return *found;
  if (is_immediate(text)) {
    if (width == 8 && (begins_with(text, "0f") || begins_with(text, "0F"))) {
      return constant(bits<uint64_t>(double(bits<float>(uint32_t(parse_immediate(text))))), 8);
    }
    return constant(parse_immediate(text), width);
  }
  if (text == "WARP_SZ") return constant(kLanes, width);
  if (text[0] == '%') return special(text);
  // the address of a variable
  size_t plus = text.find('+');
  std::string name = trim(text.substr(0, plus));
  uint64_t offset = plus == std::string::npos ? 0 : parse_immediate(trim(text.substr(plus + 1)));
  if (auto it = shared_.find(name); it != shared_.end()) {
    return constant(it->second + offset, width);
  }
  if (module.dynamic_shared.count(name)) {
    Operand operand = scratch(width);
    kernel.dynamic_shared.push_back({operand.offset, width, offset});
    return operand;
  }
  if (const uint64_t* local = find_local(name)) {
    if (*local + offset) fail("address inside local memory: " + text);
    return special("%local");
  }
  if (auto it = kernel.parameter_of.find(name); it != kernel.parameter_of.end()) {
    return constant(it->second.offset + offset, width);
  }
  if (auto it = module.variables.find(name); it != module.variables.end()) {
    return constant(it->second.address + offset, width);
  }
  fail("unknown operand " + text);
}

Operand Decoder::destination(const std::string& text) {
  Operand* found = find(text);
  if (!found) fail("unknown destination " + text);
  return *found;
}

Address Decoder::address(const std::string& text, Space space) {
  if (text[0] != '[') fail("not an address: " + text);
  std::string inside = trim(braceless(text));
  Address address = {0, true, 0, space};
  size_t sign = inside.find_first_of("+-", 1);
  if (sign != std::string::npos) {
    address.offset = int64_t(parse_immediate(trim(inside.substr(sign + 1))));
    if (inside[sign] == '-') address.offset = -address.offset;
    inside = trim(inside.substr(0, sign));
  }
  if (const uint64_t* local = find_local(inside)) {
    address.base = special("%local").offset;
    address.offset += int64_t(*local);
    address.space = Space::kLocal;
    return address;
  }
  Operand base = source(inside, 8);
  if (base.width < 4) fail("address of " + std::to_string(base.width) + " bytes: " + text);
  address.base = base.offset;
  address.wide = base.width == 8;
  return address;
}

std::string Decoder::label_name(const std::string& label) const {
  return std::to_string(calls_.back()) + label;
}

void Decoder::branch_to(const std::string& label) {
  jumps_.push_back({uint32_t(kernel.code.size()), label_name(label)});
}

void Decoder::branch_to_any(const std::string& targets) {
  table_jumps_.push_back({uint32_t(kernel.code.size()), label_name(targets)});
}

void Decoder::declare_registers(const std::string& text) {  // .reg .b32 %r<5>, a
  std::istringstream words(text);
  std::string type;
  words >> type >> type;
  const TypeInfo* info = find_type(type.substr(1));
  if (!info) fail("register type " + type);
  std::string names;
  std::getline(words, names, '\0');
  for (const std::string& name : split(names, ',')) {
    size_t less = name.find('<');
    if (less == std::string::npos) {
      scopes_.back().registers[name] = scratch(info->width);
      continue;
    }
    int number = atoi(name.c_str() + less + 1);
    for (int i = 0; i < number; i++) {
      scopes_.back().registers[name.substr(0, less) + std::to_string(i)] = scratch(info->width);
    }
  }
}

uint64_t Decoder::declare_local(const std::string& text) {
  Declaration declared(text);
  uint32_t offset = round_up(kernel.local_bytes, std::max(declared.alignment, 16u));
  kernel.local_bytes = offset + uint32_t(declared.size());
  return scopes_.back().local[declared.name] = offset;
}

void Decoder::statement(const std::string& text) {
  if (text.empty()) return;
  if (text[0] != '.') {
    instruction(text);
  } else if (begins_with(text, ".reg")) {
    declare_registers(text);
  } else if (begins_with(text, ".shared")) {
    Declaration declared(text);
    uint32_t offset = round_up(kernel.shared_bytes, declared.alignment);
    shared_[declared.name] = offset;
    kernel.shared_bytes = offset + uint32_t(declared.size());
  } else if (begins_with(text, ".local") || begins_with(text, ".param")) {
    declare_local(text);  // .param: an argument of a call
  } else if (begins_with(text, ".branchtargets")) {
    for (const std::string& label : split(text.substr(strlen(".branchtargets")), ',')) {
      tables_[last_label_].push_back(label_name(label));
    }
  } else if (begins_with(text, ".loc")) {  // ends with its line
    size_t end = text.find('\n');
    if (end != std::string::npos) statement(trim(text.substr(end)));
  } else if (!begins_with(text, ".pragma") && !begins_with(text, ".callprototype")) {
    fail("directive " + text);
  }
}

void Decoder::instruction(const std::string& text) {
  std::string line = text;
  std::replace_if(line.begin(), line.end(), [](char each) { return isspace(each); }, ' ');
  Instruction decoded;
  decoded.line = uint32_t(kernel.lines.size());
  kernel.lines.push_back(line);
  std::string rest = line;
  std::string guard;
  if (line[0] == '@') {
    size_t space = line.find(' ');
    guard = line.substr(1, space - 1);
    rest = trim(line.substr(space));
  }
  Statement statement(*this, rest, decoded);
  if (!guard.empty()) statement.instruction.predicate = statement.predicate_in(guard);
  auto [opcode, added] = opcodes_.try_emplace(statement.opcode);
  if (added) {
    auto& all = module.opcodes;
    auto known = std::find(all.begin(), all.end(), statement.opcode);
    opcode->second = uint16_t(known - all.begin());
    if (known == all.end()) all.push_back(statement.opcode);
  }
  statement.instruction.opcode = opcode->second;
  auto decode = decoders().find(statement.name);
  if (decode == decoders().end()) statement.unsupported();
  decode->second(statement);
}

void Decoder::call(const std::string& operands) {  // (result), function, (argument, ...)
  std::vector<std::string> parts = split(operands, ',');
  std::vector<std::string> given;
  const Function* function = nullptr;
  for (const std::string& part : parts) {
    if (part[0] == '(') {
      for (const std::string& name : split(braceless(part), ',')) given.push_back(name);
    } else if (auto it = module.functions.find(part); it != module.functions.end()) {
      function = &it->second;
    } else {
      fail("call of an unknown function: " + operands);
    }
  }
  if (calls_.size() > 32) fail("recursive call: " + operands);
  if (!function || given.size() != function->arguments.size()) fail("call: " + operands);
  Scope scope;
  for (size_t i = 0; i < given.size(); i++) {
    const uint64_t* argument = find_local(given[i]);
    if (!argument) fail("argument of a call: " + given[i]);
    scope.local[function->arguments[i]] = *argument;
  }
  // its names are its own
  std::vector<Scope> callers = std::exchange(scopes_, {scope});
  calls_.push_back(++number_of_calls_);
  body(function->body);
  labels_[label_name(kReturn)] = uint32_t(kernel.code.size());
  calls_.pop_back();
  scopes_ = std::move(callers);
}

void Decoder::body(const std::string& text) {
  scopes_.emplace_back();
  std::string part;
  int vector_depth = 0;
  for (size_t i = 0; i < text.size(); i++) {
    char each = text[i];
    bool outside = vector_depth == 0;
    if (each == '"') {
      size_t end = text.find('"', i + 1);
      part += text.substr(i, end - i + 1);
      i = end;
    } else if (each == '{' && outside && trim(part).empty()) {
      scopes_.emplace_back();
    } else if (each == '}' && outside) {
      if (!trim(part).empty()) fail("statement without an end: " + part);
      scopes_.pop_back();
      if (scopes_.empty()) fail("too many }");
    } else if (each == ';' && outside) {
      statement(trim(part));
      part.clear();
    } else if (!text.compare(i, 2, "::")) {
      part += "::";
      i++;
    } else if (each == ':' && outside) {
      last_label_ = label_name(trim(part));
      labels_[last_label_] = uint32_t(kernel.code.size());
      part.clear();
    } else {
      if (each == '{') vector_depth++;
      if (each == '}') vector_depth--;
      part += each;
    }
  }
  scopes_.pop_back();
}

void Decoder::decode() {
  calls_ = {0};
  scopes_.emplace_back();
  for (const std::string& declaration : module.shared) {
    statement(declaration.substr(declaration.find(".shared")));
  }
  body(kernel.body);
  Instruction end;
  end.kind = Instruction::Kind::kExit;
  end.line = uint32_t(kernel.lines.size());
  kernel.lines.push_back("ret");
  push(end);
  auto target = [&](const std::string& label) {
    auto it = labels_.find(label);
    if (it == labels_.end()) fail("unknown label " + label);
    return it->second;
  };
  for (const Jump& jump : jumps_) kernel.code[jump.instruction].target = target(jump.label);
  for (const Jump& jump : table_jumps_) {
    for (const std::string& label : tables_[jump.label]) {
      kernel.code[jump.instruction].targets.push_back(target(label));
    }
  }
  for (const auto& [name, alignment] : module.dynamic_shared) {
    kernel.dynamic_alignment = std::max(kernel.dynamic_alignment, alignment);
  }
}

Statement::Statement(Decoder& decoder, const std::string& text, Instruction instruction)
    : decoder(decoder), text(text), instruction(std::move(instruction)) {
  opcode = text.substr(0, text.find_first_of(" ({["));
  operands = split(trim(text.substr(opcode.size())), ',');
  modifiers = split(opcode, '.');
  name = modifiers.front();
  modifiers.erase(modifiers.begin());
  for (const std::string& modifier : modifiers) {
    if (const TypeInfo* info = find_type(modifier)) types_.push_back(*info);
  }
}

bool Statement::has(const std::string& modifier) const {
  return std::find(modifiers.begin(), modifiers.end(), modifier) != modifiers.end();
}

Type Statement::type(int i) const {
  if (types_.empty()) return Type::kNone;
  return i < 0 ? types_.back().type : types_.at(i).type;
}

int Statement::width() const { return types_.empty() ? 0 : types_.back().width; }

Space Statement::space() const {
  for (const std::string& modifier : modifiers) {
    if (modifier == "global" || modifier == "const") return Space::kGlobal;
    if (begins_with(modifier, "shared")) return Space::kShared;
    if (modifier == "local") return Space::kLocal;
    if (begins_with(modifier, "param")) return Space::kParameter;
  }
  return Space::kGeneric;
}

void Statement::check_width(const std::string& operand, int has, int wants) const {
  if (has == wants) return;
  fail("operand " + operand + " has " + std::to_string(has) + " bytes, not " +
       std::to_string(wants) + ": " + text);
}

Predicate Statement::predicate_in(const std::string& operand) {
  bool negated = operand[0] == '!';
  Operand source = decoder.source(negated ? trim(operand.substr(1)) : operand, 0);
  check_width(operand, source.width, 0);
  return {source.offset, negated};
}

Predicate Statement::predicate_out(const std::string& operand) {
  Operand to = operand == "_" ? decoder.scratch(0) : decoder.destination(operand);
  check_width(operand, to.width, 0);
  return {to.offset, false};
}

std::pair<std::string, std::string> Statement::pair(int operand) const {
  const std::string& both = operands.at(operand);
  size_t bar = both.find('|');
  if (bar == std::string::npos) return {both, "_"};
  return {trim(both.substr(0, bar)), trim(both.substr(bar + 1))};
}

std::vector<std::string> Statement::elements(int operand) const {
  const std::string& all = operands.at(operand);
  if (all[0] == '{') return split(braceless(all), ',');
  return {all};
}

void Statement::emit(Execute execute) {
  instruction.execute = std::move(execute);
  decoder.push(instruction);
}

void Statement::emit_control() { decoder.push(instruction); }

}  // namespace ptxcpu
