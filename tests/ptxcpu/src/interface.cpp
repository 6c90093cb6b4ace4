// The C interface for interpreter.py. Texts that are returned are valid until the next call.
#include "report.h"

using namespace ptxcpu;

namespace {

std::string answer;
const char* answered(std::string text) { return (answer = std::move(text)).c_str(); }

}  // namespace

extern "C" {

// The handle of a module, or null: then ptxcpu_error() says why.
void* ptxcpu_load(const char* ptx) {
  try {
    return parse_module(ptx).release();
  } catch (const std::exception& error) {
    answered(error.what());
    return nullptr;
  }
}

const char* ptxcpu_error() { return answer.c_str(); }

void ptxcpu_unload(void* module) { delete static_cast<Module*>(module); }

// {kernel: {"parameters": [[offset, size], ...], "parameter_bytes": n, "shared_bytes": static,
//  "error": why it cannot run or ""}}
const char* ptxcpu_describe(void* handle) {
  Module& module = *static_cast<Module*>(handle);
  std::string all;
  for (const auto& [name, parsed] : module.kernels) {
    const Kernel& kernel = *module.kernel(name);
    std::string parameters;
    for (const Parameter& parameter : kernel.parameters) {
      parameters += (parameters.empty() ? "[" : ", [") + std::to_string(parameter.offset) + ", " +
                    std::to_string(parameter.size) + "]";
    }
    all += (all.empty() ? "" : ", ") + json_string(name) + ": {\"parameters\": [" + parameters +
           "], \"parameter_bytes\": " + std::to_string(kernel.parameter_bytes) +
           ", \"shared_bytes\": " + std::to_string(kernel.shared_bytes) +
           ", \"error\": " + json_string(kernel.error) + "}";
  }
  return answered("{" + all + "}");
}

// dimensions: grid x, y, z, block x, y, z, bytes of dynamic shared memory. options: check, order,
// statistics, footprint. regions: [number_of_regions][2] addresses and sizes of the buffers.
const char* ptxcpu_launch(void* handle, const char* name, const uint32_t* dimensions,
                          const int* options, const uint64_t* regions, int number_of_regions,
                          const uint8_t* parameters) {
  Module& module = *static_cast<Module*>(handle);
  const uint32_t* d = dimensions;
  Configuration configuration = {{d[0], d[1], d[2]},
                                 {d[3], d[4], d[5]},
                                 d[6],
                                 {options[0], options[1], bool(options[2]), bool(options[3])}};
  Regions buffers;
  for (int i = 0; i < number_of_regions; i++) buffers.add(regions[2 * i], regions[2 * i + 1]);
  for (const auto& [variable, place] : module.variables) buffers.add(place.address, place.size);
  Launch launch(module, *module.kernel(name), configuration, buffers, parameters);
  try {
    launch.run();
  } catch (const PtxError& error) {
    launch.statistics.errors++;
    launch.messages.push_back(error.what());
  }
  return answered("{" + json_fields(launch, module) + "}");
}
}
