#include "report.h"

namespace ptxcpu {
namespace {

constexpr std::pair<const char*, uint64_t Statistics::*> kFields[] = {
    {"warp_instructions", &Statistics::warp_instructions},
    {"lane_instructions", &Statistics::lane_instructions},
    {"global_load_requests", &Statistics::global_load_requests},
    {"global_load_sectors", &Statistics::global_load_sectors},
    {"global_load_bytes", &Statistics::global_load_bytes},
    {"global_store_requests", &Statistics::global_store_requests},
    {"global_store_sectors", &Statistics::global_store_sectors},
    {"global_store_bytes", &Statistics::global_store_bytes},
    {"footprint_read_sectors", &Statistics::footprint_read_sectors},
    {"footprint_written_sectors", &Statistics::footprint_written_sectors},
    {"shared_requests", &Statistics::shared_requests},
    {"shared_wavefronts", &Statistics::shared_wavefronts},
    {"shared_wavefronts_ideal", &Statistics::shared_wavefronts_ideal},
    {"local_requests", &Statistics::local_requests},
    {"flops", &Statistics::flops},
    {"mma_flops", &Statistics::mma_flops},
    {"barriers", &Statistics::barriers},
    {"atomics", &Statistics::atomics},
    {"divergences", &Statistics::divergences},
    {"errors", &Statistics::errors},
};

}  // namespace

std::string json_string(const std::string& text) {
  std::string out = "\"";
  for (char each : text) {
    if (each == '"' || each == '\\') out += '\\';
    out += uint8_t(each) < ' ' ? ' ' : each;
  }
  return out + '"';
}

std::string json_fields(const Launch& launch, const Module& module) {
  std::string statistics, messages, instructions;
  auto separated = [](std::string& list) -> std::string& {
    return list += list.empty() ? "" : ", ";
  };
  for (auto [name, field] : kFields) {
    separated(statistics) += json_string(name) + ": " + std::to_string(launch.statistics.*field);
  }
  for (const std::string& message : launch.messages) separated(messages) += json_string(message);
  for (size_t i = 0; i < launch.opcode_counts.size(); i++) {
    if (!launch.opcode_counts[i]) continue;
    separated(instructions) +=
        json_string(module.opcodes[i]) + ": " + std::to_string(launch.opcode_counts[i]);
  }
  return "\"statistics\": {" + statistics + "}, \"messages\": [" + messages +
         "], \"instructions\": {" + instructions + "}";
}

}  // namespace ptxcpu
