// What is executed (Module, Kernel, Instruction) and what executes it (Launch, Block, Warp).
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "memory.h"
#include "numbers.h"

namespace ptxcpu {

struct Warp;
using Execute = std::function<void(Warp&, Mask)>;

// A register: 32 lanes of T, or for predicates one Mask, at an offset of the warp's registers.
constexpr uint32_t kNoRegister = ~0u;
template <class T>
struct Register {
  uint32_t offset = kNoRegister;
  inline T* operator()(const Warp& warp) const;
};
struct Predicate {
  uint32_t offset = kNoRegister;
  bool negated = false;
  inline Mask read(const Warp& warp) const;
  inline void write(Warp& warp, Mask where, Mask values) const;
};

struct Barrier {
  enum class Reduction { kNone, kPopulation, kAnd, kOr };
  Register<uint32_t> id, threads;  // threads: none given, all of the block
  bool arrive = false;             // does not wait
  Reduction reduction = Reduction::kNone;
  Predicate source;
  uint32_t destination = kNoRegister;
};

struct Instruction {
  enum class Kind : uint8_t { kPlain, kBranch, kBranchTable, kExit, kBarrier };
  Kind kind = Kind::kPlain;
  Predicate predicate;  // executes where it holds, if there is one
  uint16_t opcode = 0;  // in Module::opcodes
  uint32_t line = 0;    // in Kernel::lines
  uint32_t target = 0;  // of a branch
  Execute execute;      // of a plain instruction
  std::vector<uint32_t> targets;
  Register<uint32_t> index;  // into targets
  Barrier barrier;
};

struct Parameter {
  uint32_t offset, size;
};

struct Constant {
  uint32_t offset;
  int width;  // bytes a lane, 0: predicate
  uint64_t value;
};

struct Kernel {
  std::string name, body;
  bool decoded = false;
  std::string error;  // why it cannot run
  std::map<std::string, Parameter> parameter_of;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t max_threads = 1024;  // of a block: .maxntid or .reqntid
  uint32_t min_blocks = 1;      // of a multiprocessor: .minnctapersm

  // from the body
  std::vector<Instruction> code;
  std::vector<std::string> lines;
  uint32_t register_bytes = 0;
  std::vector<Constant> constants;
  std::vector<Constant> dynamic_shared;      // hold value + the offset of dynamic shared memory
  std::map<std::string, uint32_t> specials;  // registers of %tid.x and so on
  uint32_t shared_bytes = 0, local_bytes = 0;
  uint32_t dynamic_alignment = 1;  // of dynamic shared memory, which follows shared_bytes
};

struct Function {
  std::string body;
  std::vector<std::string> arguments;  // names of the results and parameters
};

struct Variable {
  std::unique_ptr<uint8_t[]> storage;
  uint64_t address, size;
};

struct Module {
  int target = 0;            // 80 for sm_80
  bool only_target = false;  // sm_90a: runs on nothing else
  std::map<std::string, Kernel> kernels;
  std::map<std::string, Function> functions;
  std::map<std::string, Variable> variables;       // .global and .const
  std::vector<std::string> shared;                 // declarations of .shared outside of kernels
  std::map<std::string, uint32_t> dynamic_shared;  // extern .shared: name and alignment
  std::vector<std::string> opcodes;

  // The kernel, ready to run; its error says why if it cannot. nullptr: there is none.
  Kernel* kernel(const std::string& name);
};

std::unique_ptr<Module> parse_module(const std::string& ptx);

struct Dimensions {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t(x) * y * z; }
};

struct Options {
  int check = 2;  // 1: races between warps, uninitialised shared memory. 2: within warps
  int order = 0;  // of warps and blocks; 0: rising, 1: falling, 2...: random seeds
  bool statistics = true;
  bool footprint = false;  // count distinct sectors
};

struct Configuration {
  Dimensions grid, block;
  uint32_t dynamic_shared = 0;
  Options options;
};

struct Block;

// A launch in progress and, after it, what it did.
struct Launch {
  const Kernel& kernel;
  Configuration configuration;
  const Regions& regions;
  std::vector<uint8_t> parameters;
  Statistics statistics;
  Footprint footprint;
  std::vector<uint64_t> opcode_counts;
  std::vector<std::string> messages;  // the first of each kind at each instruction

  Launch(const Module& module, const Kernel& kernel, const Configuration& configuration,
         const Regions& regions, const uint8_t* parameters);
  void run();
  // kind: what the message is about, whatever the thread and address.
  void report(const Warp& warp, const std::string& kind, const std::string& detail = "");

 private:
  std::map<std::pair<std::string, uint32_t>, int> reported_;
};

// The lanes that are at the same instruction.
struct Group {
  uint32_t pc;
  Mask lanes;
};

struct Warp {
  enum class State { kReady, kWaiting, kExited };

  Block* block = nullptr;
  Launch* launch = nullptr;
  int id = 0;
  uint8_t* registers = nullptr;
  State state = State::kReady;
  Mask live = 0;
  std::vector<Group> groups;
  const Instruction* current = nullptr;
  const Instruction* barrier = nullptr;  // that it waits at
  WarpClock clock;
  AsyncCopies copies;

  // Runs until it meets a barrier or all lanes have exited.
  void run();
  void report(const std::string& kind, const std::string& detail = "") const {
    launch->report(*this, kind, detail);
  }
  // of instructions that all lanes execute together
  void require_whole(Mask mask, const char* what) const {
    if (mask != kAllLanes) report(std::string(what) + " executed by a part of a warp");
  }
  void count_flops(Mask mask, int each) {
    launch->statistics.flops += uint64_t(count(mask)) * each;
  }

 private:
  void run_group(Group group);
  void meet(uint32_t pc, Mask lanes);  // lanes wait at pc, with those that are there
};

struct BarrierState {
  std::vector<Warp*> waiting;
  uint32_t arrived = 0;         // threads, the waiting ones among them
  uint32_t expected = 0;        // 0: all of the block
  std::vector<uint32_t> known;  // what the arrived warps knew of the others' accesses
};

struct Block {
  Launch& launch;
  Dimensions index;
  uint8_t* shared;
  uint32_t shared_bytes, threads;
  uint8_t* local;  // local_bytes for each thread
  uint32_t local_bytes;
  SharedChecks checks;
  std::vector<Warp> warps;
  std::map<int, BarrierState> barriers;
  bool stuck = false;

  void arrive(Warp& warp, const Instruction& instruction, Mask lanes);
  void unblock();
  uint8_t* local_of(int thread) const { return local + size_t(thread) * local_bytes; }
  bool owns_shared(uint64_t address) const {
    return address - uint64_t(shared) < std::max(shared_bytes, 1u);
  }
  bool owns_local(uint64_t address) const {
    return address - uint64_t(local) < uint64_t(local_bytes) * ((threads + 31) / 32 * 32);
  }
  bool owns_parameters(uint64_t address) const {
    return address - uint64_t(launch.parameters.data()) < launch.parameters.size();
  }

 private:
  void complete(BarrierState& barrier);
};

template <class T>
inline T* Register<T>::operator()(const Warp& warp) const {
  return reinterpret_cast<T*>(warp.registers + offset);
}
inline Mask Predicate::read(const Warp& warp) const {
  Mask value = *reinterpret_cast<Mask*>(warp.registers + offset);
  return negated ? ~value : value;
}
inline void Predicate::write(Warp& warp, Mask where, Mask values) const {
  Mask& value = *reinterpret_cast<Mask*>(warp.registers + offset);
  value = (value & ~where) | (values & where);
}

}  // namespace ptxcpu
