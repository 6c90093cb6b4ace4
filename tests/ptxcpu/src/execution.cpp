// Runs a launch: blocks one after another, the warps of a block in turns between barriers, the
// lanes of a warp in lockstep. Lanes that diverge form groups, of which the one that is furthest
// back runs, up to the next one: so they meet again where their paths do.
#include <cassert>

#include "machine.h"

namespace ptxcpu {
namespace {

constexpr size_t kMessages = 20;

// An order of n things: rising, falling, or shuffled.
class Order {
 public:
  explicit Order(int kind) : kind_(kind), random_(uint64_t(kind) * 0x9e3779b97f4a7c15 + 1) {}
  template <class T>
  void apply(std::vector<T>& things) {
    if (kind_ == 1) std::reverse(things.begin(), things.end());
    if (kind_ <= 1) return;
    for (size_t i = things.size(); i > 1; i--) std::swap(things[i - 1], things[next() % i]);
  }

 private:
  uint64_t next() {
    random_ = random_ * 6364136223846793005 + 1442695040888963407;
    return random_ >> 33;
  }
  int kind_;
  uint64_t random_;
};

// Memory aligned as a GPU's is.
class Buffer {
 public:
  Buffer(size_t bytes, size_t alignment) : storage_(bytes + alignment) {
    data_ = storage_.data() + (-uint64_t(storage_.data()) & (alignment - 1));
  }
  uint8_t* data() const { return data_; }

 private:
  std::vector<uint8_t> storage_;
  uint8_t* data_;
};

uint32_t round_up(uint32_t x, uint32_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

uint32_t dynamic_offset(const Kernel& kernel) {
  return round_up(kernel.shared_bytes, kernel.dynamic_alignment);
}

void fill_constants(const Kernel& kernel, uint8_t* registers) {
  auto fill = [&](const Constant& constant, uint64_t value) {
    uint8_t* to = registers + constant.offset;
    if (constant.width == 0) {
      Mask mask = value ? kAllLanes : 0;
      memcpy(to, &mask, sizeof mask);
    }
    for (int i = 0; i < kLanes; i++) memcpy(to + i * constant.width, &value, constant.width);
  };
  for (const Constant& constant : kernel.constants) fill(constant, constant.value);
  for (const Constant& constant : kernel.dynamic_shared) {
    fill(constant, constant.value + dynamic_offset(kernel));
  }
}

uint32_t special_value(const std::string& name, const Block& block, const Warp& warp, int lane) {
  const Configuration& configuration = block.launch.configuration;
  Dimensions threads = configuration.block;
  uint32_t thread = uint32_t(warp.id * kLanes + lane);
  auto axis = [&](const Dimensions& dimensions) {
    return name.back() == 'x' ? dimensions.x : name.back() == 'y' ? dimensions.y : dimensions.z;
  };
  std::string base = name.substr(0, name.find('.'));
  if (base == "%tid")
    return axis(
        {thread % threads.x, thread / threads.x % threads.y, thread / threads.x / threads.y});
  if (base == "%ntid") return axis(threads);
  if (base == "%ctaid") return axis(block.index);
  if (base == "%nctaid") return axis(configuration.grid);
  if (name == "%laneid") return lane;
  if (name == "%warpid") return warp.id;
  if (name == "%nwarpid") return uint32_t(block.warps.size());
  if (name == "%smid" || name == "%gridid") return 0;
  if (name == "%nsmid") return 1;
  if (name == "%dynamic_smem_size") return configuration.dynamic_shared;
  if (name == "%total_smem_size") return block.shared_bytes;
  if (name == "%lanemask_eq") return 1u << lane;
  if (name == "%lanemask_lt") return (1u << lane) - 1;
  if (name == "%lanemask_le") return (2u << lane) - 1;
  if (name == "%lanemask_gt") return ~((2u << lane) - 1);
  if (name == "%lanemask_ge") return ~((1u << lane) - 1);
  fail("special register " + name);
}

void fill_specials(const Kernel& kernel, const Block& block, Warp& warp) {
  for (const auto& [name, offset] : kernel.specials) {
    for (int lane = 0; lane < kLanes; lane++) {
      if (name == "%local") {
        Register<uint64_t>{offset}(warp)[lane] = uint64_t(block.local_of(warp.id * kLanes + lane));
      } else if (name == "%gridid") {
        Register<uint64_t>{offset}(warp)[lane] = 0;
      } else {
        Register<uint32_t>{offset}(warp)[lane] = special_value(name, block, warp, lane);
      }
    }
  }
}

void run_block(Block& block, const Kernel& kernel, uint8_t* registers, uint32_t register_bytes,
               Order& order) {
  memset(block.shared, 0xff, block.shared_bytes);
  block.checks.reset(block.shared_bytes);
  block.warps.assign((block.threads + kLanes - 1) / kLanes, Warp());
  for (size_t i = 0; i < block.warps.size(); i++) {
    Warp& warp = block.warps[i];
    warp.block = &block;
    warp.launch = &block.launch;
    warp.id = int(i);
    warp.registers = registers + i * register_bytes;
    uint32_t threads = std::min<uint32_t>(kLanes, block.threads - uint32_t(i) * kLanes);
    warp.live = threads == kLanes ? kAllLanes : (1u << threads) - 1;
    warp.groups = {{0, warp.live}};
    warp.clock.known.assign(block.warps.size(), 0);
    warp.current = &kernel.code[0];
    fill_specials(kernel, block, warp);
  }
  for (;;) {
    std::vector<Warp*> ready;
    bool waiting = false;
    for (Warp& warp : block.warps) {
      if (warp.state == Warp::State::kReady) ready.push_back(&warp);
      waiting = waiting || warp.state == Warp::State::kWaiting;
    }
    if (ready.empty()) {
      if (waiting) block.unblock();
      if (!waiting || block.stuck) return;
      continue;
    }
    order.apply(ready);
    for (Warp* warp : ready) warp->run();
  }
}

}  // namespace

Launch::Launch(const Module& module, const Kernel& kernel, const Configuration& configuration,
               const Regions& regions, const uint8_t* parameters)
    : kernel(kernel),
      configuration(configuration),
      regions(regions),
      parameters(parameters, parameters + kernel.parameter_bytes),
      footprint(regions),
      opcode_counts(module.opcodes.size()) {}

void Launch::report(const Warp& warp, const std::string& kind, const std::string& detail) {
  statistics.errors++;
  uint32_t line = warp.current->line;
  if (reported_[{kind, line}]++ || messages.size() >= kMessages) return;
  Dimensions at = warp.block->index;
  messages.push_back(kind + detail + " [block " + std::to_string(at.x) + "," +
                     std::to_string(at.y) + "," + std::to_string(at.z) + " warp " +
                     std::to_string(warp.id) + "] " + kernel.lines[line]);
}

void Launch::run() {
  Dimensions grid = configuration.grid;
  const Options& options = configuration.options;
  uint32_t threads = uint32_t(configuration.block.count());
  uint32_t warps = (threads + kLanes - 1) / kLanes;
  uint32_t shared_bytes = configuration.dynamic_shared
                              ? dynamic_offset(kernel) + configuration.dynamic_shared
                              : kernel.shared_bytes;
  uint32_t local_bytes = round_up(kernel.local_bytes, 16);
  uint32_t register_bytes = round_up(kernel.register_bytes, 128);
  Buffer shared(shared_bytes + 16, 1024), local(size_t(local_bytes) * warps * kLanes + 16, 64);
  Buffer registers(size_t(register_bytes) * warps, 64);
  for (uint32_t i = 0; i < warps; i++) {
    fill_constants(kernel, registers.data() + size_t(i) * register_bytes);
  }
  if (options.footprint) footprint.enable();
  std::vector<Dimensions> blocks;
  for (uint32_t z = 0; z < grid.z; z++) {
    for (uint32_t y = 0; y < grid.y; y++) {
      for (uint32_t x = 0; x < grid.x; x++) blocks.push_back({x, y, z});
    }
  }
  Order order(options.order);
  order.apply(blocks);
  Block block{*this, {}, shared.data(), shared_bytes, threads, local.data(), local_bytes, {},
              {},    {}};
  for (const Dimensions& index : blocks) {
    block.index = index;
    block.barriers.clear();
    block.stuck = false;
    run_block(block, kernel, registers.data(), register_bytes, order);
  }
  footprint.count(statistics);
}

// ---- warps ----

void Warp::meet(uint32_t pc, Mask lanes) {
  for (Group& group : groups) {
    if (group.pc == pc) {
      group.lanes |= lanes;
      return;
    }
  }
  groups.push_back({pc, lanes});
}

void Warp::run() {
  while (!groups.empty() && state == State::kReady) {
    auto furthest_back = std::min_element(
        groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.pc < b.pc; });
    Group group = *furthest_back;
    groups.erase(furthest_back);
    run_group(group);
  }
  if (!groups.empty()) return;
  state = State::kExited;
  if (copies.pending()) report("warp exits with copies of cp.async not waited for");
}

// Until the group meets another, splits, ends or waits.
void Warp::run_group(Group group) {
  auto [pc, lanes] = group;
  uint32_t next_group = ~0u;
  for (const Group& other : groups) next_group = std::min(next_group, other.pc);
  Statistics& statistics = launch->statistics;
  if (!groups.empty()) statistics.divergences++;
  bool counting = launch->configuration.options.statistics;
  const Instruction* code = launch->kernel.code.data();
  for (;; pc++) {
    if (pc >= next_group) return meet(pc, lanes);
    const Instruction& instruction = code[pc];
    current = &instruction;
    Mask executing = lanes;
    if (instruction.predicate.offset != kNoRegister) executing &= instruction.predicate.read(*this);
    if (counting) {
      statistics.warp_instructions++;
      statistics.lane_instructions += count(executing);
      launch->opcode_counts[instruction.opcode]++;
    }
    if (instruction.kind == Instruction::Kind::kPlain) {
      if (executing) instruction.execute(*this, executing);
      continue;
    }
    if (!executing) continue;
    switch (instruction.kind) {
      case Instruction::Kind::kBranch:
        if (executing != lanes) meet(pc + 1, lanes & ~executing);
        if (executing != lanes || !groups.empty()) return meet(instruction.target, executing);
        pc = instruction.target - 1;
        break;
      case Instruction::Kind::kBranchTable: {
        const uint32_t* index = instruction.index(*this);
        for_lanes(executing,
                  [&](int lane) { meet(instruction.targets.at(index[lane]), 1u << lane); });
        if (executing != lanes) meet(pc + 1, lanes & ~executing);
        return;
      }
      case Instruction::Kind::kExit:
        live &= ~executing;
        lanes &= ~executing;
        if (!lanes) return;
        break;
      case Instruction::Kind::kBarrier:
        meet(pc + 1, lanes);
        block->arrive(*this, instruction, executing);
        return;
      default: break;
    }
  }
}

// ---- barriers ----

void Block::arrive(Warp& warp, const Instruction& instruction, Mask lanes) {
  if (lanes != warp.live) {
    warp.report("divergent barrier: only a part of the warp's lanes reaches it together");
  }
  const Barrier& barrier = instruction.barrier;
  int lane = first(lanes);
  int id = int(barrier.id(warp)[lane]);
  bool partial = barrier.threads.offset != kNoRegister;
  BarrierState& state = barriers[id];
  uint32_t expected = partial ? barrier.threads(warp)[lane] : 0;
  if (state.arrived && expected != state.expected) {
    warp.report("warps give different numbers of threads for the same barrier");
  }
  state.expected = expected;
  state.arrived += kLanes;
  state.known.resize(warps.size());
  for (size_t i = 0; i < warps.size(); i++) {
    state.known[i] = std::max(state.known[i], warp.clock.known[i]);
  }
  if (barrier.arrive) checks.time++;
  state.known[warp.id] = checks.time + !barrier.arrive;
  if (!barrier.arrive) {
    warp.state = Warp::State::kWaiting;
    warp.barrier = &instruction;
    state.waiting.push_back(&warp);
  }
  uint32_t all = uint32_t(warps.size()) * kLanes;
  if (state.arrived >= (expected ? expected : all)) complete(state);
}

void Block::complete(BarrierState& state) {
  std::vector<Warp*> waiting = std::move(state.waiting);
  std::vector<uint32_t> known = std::move(state.known);
  uint32_t expected = state.expected;
  state = BarrierState();
  launch.statistics.barriers++;
  checks.time++;
  if (waiting.empty()) return;
  const Instruction* where = waiting[0]->barrier;
  if (!expected) {
    for (Warp* warp : waiting) {
      if (warp->barrier == where) continue;
      warp->report("warps meet at different barrier instructions");
      break;
    }
  }
  const Barrier& barrier = where->barrier;
  if (barrier.reduction != Barrier::Reduction::kNone) {
    uint32_t holds = 0, threads = 0;
    for (Warp* warp : waiting) {
      holds += count(barrier.source.read(*warp) & warp->live);
      threads += count(warp->live);
    }
    for (Warp* warp : waiting) {
      if (barrier.reduction == Barrier::Reduction::kPopulation) {
        std::fill_n(Register<uint32_t>{barrier.destination}(*warp), kLanes, holds);
      } else {
        bool all = barrier.reduction == Barrier::Reduction::kAnd;
        Predicate{barrier.destination}.write(*warp, kAllLanes,
                                             (all ? holds == threads : holds > 0) ? kAllLanes : 0);
      }
    }
  }
  for (Warp* warp : waiting) {
    warp->state = Warp::State::kReady;
    WarpClock& clock = warp->clock;
    clock.synchronised++;
    clock.all_known = ~0u;
    for (size_t i = 0; i < warps.size(); i++) {
      clock.known[i] = std::max(clock.known[i], known[i]);
      if (int(i) != warp->id) clock.all_known = std::min(clock.all_known, clock.known[i]);
    }
  }
}

// Nothing can run: says why, and lets barriers of the whole block pass without the exited warps.
void Block::unblock() {
  for (auto& [id, state] : barriers) {
    if (state.waiting.empty()) continue;
    size_t alive = 0;
    for (const Warp& warp : warps) alive += warp.state != Warp::State::kExited;
    if (state.waiting.size() == alive && !state.expected) {
      state.waiting[0]->report("barrier while other warps of the block have exited");
      return complete(state);
    }
    state.waiting[0]->report("deadlock: warps wait at barriers that cannot complete");
    stuck = true;
    return;
  }
}

}  // namespace ptxcpu
