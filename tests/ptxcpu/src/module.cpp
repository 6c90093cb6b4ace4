// Reads a PTX module: its variables, and where its kernels and functions are.
#include <sstream>

#include "declaration.h"
#include "machine.h"
#include "statement.h"

namespace ptxcpu {
namespace {

std::string without_comments(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); i++) {
    if (!text.compare(i, 2, "//")) {
      i = std::min(text.find('\n', i), text.size());
      out += '\n';
    } else if (!text.compare(i, 2, "/*")) {
      i = std::min(text.find("*/", i + 2), text.size()) + 1;
    } else {
      out += text[i];
    }
  }
  return out;
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

// The text between a bracket at `open` and the one that closes it; open moves behind that.
std::string bracketed(const std::string& text, size_t& open) {
  size_t begin = open + 1;
  int depth = 0;
  for (; open < text.size(); open++) {
    if (strchr("{(", text[open])) depth++;
    if (strchr("})", text[open]) && --depth == 0) break;
  }
  if (open >= text.size()) fail("a bracket is not closed");
  return text.substr(begin, open++ - begin);
}

class ModuleParser {
 public:
  explicit ModuleParser(const std::string& ptx) : text_(without_comments(ptx)) {}

  std::unique_ptr<Module> parse() {
    std::string head;
    for (size_t i = 0; i < text_.size();) {
      if (text_[i] == ';') {
        variable(trim(head));
        head.clear();
        i++;
      } else if (text_[i] == '{' && contains(head, "=")) {
        size_t begin = i;
        bracketed(text_, i);
        head += text_.substr(begin, i - begin);  // a variable's initial values
      } else if (text_[i] == '{') {
        define(head, bracketed(text_, i));
        head.clear();
      } else if (directive(i)) {
        head.clear();
      } else {
        head += text_[i++];
      }
    }
    return std::move(module_);
  }

 private:
  // Directives that end with their line. i moves behind it.
  bool directive(size_t& i) {
    for (const char* name : {".version", ".target", ".address_size", ".file"}) {
      if (text_.compare(i, strlen(name), name)) continue;
      size_t end = std::min(text_.find('\n', i), text_.size());
      if (!strcmp(name, ".target")) target(text_.substr(i, end - i));
      i = end;
      return true;
    }
    if (!text_.compare(i, 8, ".section")) {
      i = text_.size();  // nothing but debug information follows
      return true;
    }
    return false;
  }

  void target(const std::string& line) {
    size_t number = line.find("sm_");
    if (number == std::string::npos) return;
    module_->target = atoi(line.c_str() + number + 3);
    char after = line[line.find_first_not_of("0123456789", number + 3)];
    module_->only_target = after == 'a';
  }

  void variable(const std::string& statement) {
    if (contains(statement, ".func") || contains(statement, ".entry")) return;  // declared only
    if (contains(statement, ".shared")) {
      Declaration declared(statement);
      if (contains(statement, ".extern")) {
        module_->dynamic_shared[declared.name] = declared.alignment;
      } else {
        module_->shared.push_back(statement);
      }
    } else if (contains(statement, ".global") || contains(statement, ".const")) {
      Declaration declared(statement);
      Variable variable;
      variable.size = declared.size();
      variable.storage = std::make_unique<uint8_t[]>(variable.size + 256);
      variable.address = (uint64_t(variable.storage.get()) + 255) & ~255ull;
      for (size_t i = 0; i < declared.values.size(); i++) {
        if (!is_immediate(declared.values[i])) fail("initial value in " + statement);
        uint64_t value = parse_immediate(declared.values[i]);
        memcpy(reinterpret_cast<uint8_t*>(variable.address) + i * declared.width, &value,
               declared.width);
      }
      module_->variables[declared.name] = std::move(variable);
    }
  }

  void define(const std::string& head, std::string body) {
    size_t entry = head.find(".entry"), function = head.find(".func");
    if (entry != std::string::npos) {
      define_kernel(head.substr(entry + 6), std::move(body));
    } else if (function != std::string::npos) {
      define_function(head.substr(function + 5), std::move(body));
    }
  }

  // name(parameters) directives
  void define_kernel(const std::string& head, std::string body) {
    Kernel kernel;
    size_t i = head.find('(');
    std::string after_name = i == std::string::npos ? head : head.substr(0, i);
    std::istringstream(after_name) >> kernel.name;
    if (i != std::string::npos) {
      for (const std::string& text : split(bracketed(head, i), ',')) {
        Declaration declared(text);
        uint32_t offset = (kernel.parameter_bytes + declared.alignment - 1) / declared.alignment *
                          declared.alignment;
        Parameter parameter = {offset, uint32_t(declared.size())};
        kernel.parameters.push_back(parameter);
        kernel.parameter_of[declared.name] = parameter;
        kernel.parameter_bytes = offset + parameter.size;
      }
    }
    for (const char* directive : {".maxntid", ".reqntid"}) {
      size_t at = head.find(directive);
      if (at == std::string::npos) continue;
      uint32_t x = 1, y = 1, z = 1;
      sscanf(head.c_str() + at + strlen(directive), " %u , %u , %u", &x, &y, &z);
      kernel.max_threads = x * y * z;
    }
    constexpr char kMinBlocks[] = ".minnctapersm";
    size_t at = head.find(kMinBlocks);
    if (at != std::string::npos)
      sscanf(head.c_str() + at + strlen(kMinBlocks), " %u", &kernel.min_blocks);
    kernel.body = std::move(body);
    module_->kernels[kernel.name] = std::move(kernel);
  }

  // (results) name(parameters) directives
  void define_function(const std::string& head, std::string body) {
    Function function;
    size_t i = head.find_first_not_of(" \t\n");
    auto arguments = [&] {
      for (const std::string& text : split(bracketed(head, i), ',')) {
        function.arguments.push_back(Declaration(text).name);
      }
    };
    if (head[i] == '(') arguments();
    size_t open = std::min(head.find('(', i), head.size());
    std::string name;
    std::istringstream(head.substr(i, open - i)) >> name;
    if ((i = open) < head.size()) arguments();
    function.body = std::move(body);
    module_->functions[name] = std::move(function);
  }

  std::string text_;
  std::unique_ptr<Module> module_ = std::make_unique<Module>();
};

}  // namespace

Declaration::Declaration(const std::string& text) {
  size_t equals = text.find('=');
  if (equals != std::string::npos) {
    std::string initial = trim(text.substr(equals + 1));
    if (initial[0] == '{') initial = initial.substr(1, initial.size() - 2);
    values = split(initial, ',');
  }
  std::string declared = trim(text.substr(0, equals));
  size_t open = declared.find('[');
  for (size_t i = open; i != std::string::npos; i = declared.find('[', i + 1)) {
    elements *= strtoull(declared.c_str() + i + 1, nullptr, 0);  // []: 0
  }
  std::istringstream tokens(declared.substr(0, open));
  bool pointer = false;
  for (std::string token; tokens >> token;) {
    if (token == ".align") {
      uint32_t given;
      tokens >> given;
      if (!pointer) alignment = given;  // that of a pointer is of what it points to
    } else if (token == ".ptr") {
      pointer = true;
    } else if (token[0] != '.') {
      name = token;
    } else if (const TypeInfo* info = find_type(token.substr(1))) {
      width = info->width;
    }
  }
  if (!width || name.empty()) fail("declaration " + text);
  alignment = std::max<uint32_t>(alignment, width);
}

Kernel* Module::kernel(const std::string& name) {
  auto it = kernels.find(name);
  if (it == kernels.end()) return nullptr;
  Kernel& kernel = it->second;
  if (!kernel.decoded) {
    kernel.decoded = true;
    try {
      Decoder(*this, kernel).decode();
    } catch (const PtxError& error) {
      kernel.error = "kernel " + name + " cannot run: " + error.what();
    }
    kernel.body = {};
  }
  return &kernel;
}

std::unique_ptr<Module> parse_module(const std::string& ptx) { return ModuleParser(ptx).parse(); }

}  // namespace ptxcpu
