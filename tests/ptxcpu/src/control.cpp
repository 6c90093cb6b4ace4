// Branches, calls, barriers, and what needs no doing.
#include "statement.h"

namespace ptxcpu {
namespace {

void branch(Statement& s) {
  s.instruction.kind = Instruction::Kind::kBranch;
  s.decoder.branch_to(s.operands.at(0));
  s.emit_control();
}

void branch_table(Statement& s) {  // brx.idx index, targets
  s.instruction.kind = Instruction::Kind::kBranchTable;
  s.instruction.index = s.in<uint32_t>(0);
  s.decoder.branch_to_any(s.operands.at(1));
  s.emit_control();
}

void exit(Statement& s) {
  s.instruction.kind = Instruction::Kind::kExit;
  s.emit_control();
}

void ret(Statement& s) {
  if (!s.decoder.in_function()) return exit(s);
  s.instruction.kind = Instruction::Kind::kBranch;
  s.decoder.branch_to_return();
  s.emit_control();
}

void nothing(Statement& s) {
  s.emit([](Warp&, Mask) {});
}

void trap(Statement& s) {
  s.emit([](Warp& warp, Mask) { warp.report("trap or failed assert"); });
}

void call(Statement& s) {
  if (s.text.find("__assertfail") != std::string::npos) return trap(s);
  if (s.text.find("vprintf") != std::string::npos) return nothing(s);
  if (s.instruction.predicate.offset != kNoRegister) s.unsupported();
  nothing(s);
  s.decoder.call(s.text.substr(s.opcode.size()));
}

// bar.sync id, threads; bar.arrive; bar.red.op destination, id, threads, source; bar.warp.sync
void barrier(Statement& s) {
  if (s.has("warp")) return warp_barrier(s);
  Barrier& barrier = s.instruction.barrier;
  s.instruction.kind = Instruction::Kind::kBarrier;
  size_t id = 0, end = s.operands.size();
  if (s.has("red")) {
    barrier.reduction = s.has("popc")  ? Barrier::Reduction::kPopulation
                        : s.has("and") ? Barrier::Reduction::kAnd
                                       : Barrier::Reduction::kOr;
    barrier.destination =
        s.has("popc") ? s.out<uint32_t>(0).offset : s.predicate_out(s.operands[0]).offset;
    barrier.source = s.predicate_in(s.operands.back());
    id = 1;
    end--;
  }
  barrier.arrive = s.has("arrive");
  barrier.id = s.in<uint32_t>(id < end ? s.operands[id] : "0");
  if (id + 1 < end) barrier.threads = s.in<uint32_t>(int(id + 1));
  s.emit_control();
}

}  // namespace

void add_control(Decoders& decoders) {
  decoders["bra"] = branch;
  decoders["brx"] = branch_table;
  decoders["ret"] = ret;
  decoders["exit"] = exit;
  decoders["trap"] = decoders["brkpt"] = trap;
  decoders["call"] = call;
  decoders["bar"] = decoders["barrier"] = barrier;
  // memory is coherent at once, and time does not pass
  for (const char* name : {"membar", "fence", "prefetch", "prefetchu", "nanosleep", "pmevent",
                           "griddepcontrol", "discard", "applypriority", "createpolicy"}) {
    decoders[name] = nothing;
  }
}

}  // namespace ptxcpu
