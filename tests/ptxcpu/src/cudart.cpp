// A stand-in for libcudart.so.13: programs built by nvcc run with it, kernels and all, where there
// is no GPU. Device memory is the host's; streams do everything at once; a launch that the checks
// of the interpreter object to fails with cudaErrorLaunchFailure. See README.md.
#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "report.h"

using namespace ptxcpu;

// What the handles point to.
struct CUstream_st {
  int device;
  cudaGraph_t capture = nullptr;  // not null: what is launched goes there
};
struct CUevent_st {
  double seconds = 0;
};
struct CUgraph_st {
  std::vector<std::function<cudaError_t()>> work;
};
struct CUgraphExec_st {
  std::vector<std::function<cudaError_t()>> work;
};

namespace {

double now() {
  auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(time).count();
}

// ---- settings: PTXCPU_<NAME> in the environment, ptxcpu_configure in the program ----

struct Settings {
  std::map<std::string, int> values = {
      {"check", 2},           {"order", 0},   {"statistics", 1},
      {"footprint", 0},       {"verbose", 0}, {"abort", 0},
      {"execute", 1},  // 0: launches are recorded alone
      {"devices", 1},         {"cc", 80},     {"driver", CUDART_VERSION},  // 0: none
      {"multiprocessors", 0},  // 0: those of an A100, or from cc 90 on of an H100
      {"registers", 0},        // of a thread; 0: as many as the kernel's launch bounds allow
  };
  Settings() {
    for (auto& [name, value] : values) {
      std::string variable = "PTXCPU_" + name;
      for (char& each : variable) each = char(toupper(each));
      if (const char* given = getenv(variable.c_str())) value = atoi(given);
    }
  }
  int operator[](const char* name) const { return values.at(name); }
};

struct Allocation {
  uint64_t bytes;
  int device;
  bool owned;  // by cudaMalloc, not registered
};

// The code of one fat binary, for several architectures.
struct FatBinary {
  std::vector<std::unique_ptr<Module>> modules;
};

struct KernelFunction {
  FatBinary* binary;
  std::string name;
  int dynamic_shared = 48 * 1024;  // allowed
};

struct Symbol {
  FatBinary* binary;
  std::string name;
};

struct State {
  std::recursive_mutex mutex;
  Settings settings;
  std::map<const void*, KernelFunction> kernels;
  std::map<const void*, Symbol> symbols;
  std::map<uint64_t, Allocation> allocations;
  std::set<cudaStream_t> streams;
  std::vector<std::string> launches;  // JSON
  std::map<std::string, int> calls;   // of runtime functions
  std::string json;
};

State& state() {
  static State* all = new State;  // programs launch from destructors of theirs
  return *all;
}

// What each thread of the program has of its own.
struct Thread {
  int device = 0;
  cudaError_t last_error = cudaSuccess;
};
thread_local Thread this_thread;

cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) this_thread.last_error = error;
  return error;
}

// Begins every function of the runtime.
struct Call {
  std::lock_guard<std::recursive_mutex> lock{state().mutex};
  explicit Call(const char* name) { state().calls[name]++; }
};
#define PTXCPU_CALL Call call(__func__)

// What a multiprocessor holds, by compute capability. CUDA keeps 1 KiB of shared memory a block.
constexpr int kReservedShared = 1024, kRegisters = 65536;
struct Limits {
  int threads, blocks, shared;
  int block_shared() const { return shared - kReservedShared; }
};
Limits limits() {
  int cc = state().settings["cc"];
  switch (cc) {
    case 80: return {2048, 32, 164 * 1024};
    case 86: return {1536, 16, 100 * 1024};
    case 87: return {1536, 16, 164 * 1024};
    case 89: return {1536, 24, 100 * 1024};
    case 110: return {1536, 24, 228 * 1024};
    default:
      if (cc < 80) return {1024, 16, 64 * 1024};
      if (cc < 120) return {2048, 32, 228 * 1024};
      return {1536, 24, 100 * 1024};
  }
}

int multiprocessors() {
  int given = state().settings["multiprocessors"];
  return given ? given : state().settings["cc"] >= 90 ? 132 : 108;
}

bool capturing() {
  for (cudaStream_t stream : state().streams) {
    if (stream->capture) return true;
  }
  return false;
}

// nullptr, cudaStreamLegacy and cudaStreamPerThread are the current device's own streams.
bool valid(cudaStream_t stream) {
  if (uint64_t(stream) <= 2) return true;
  return state().streams.count(stream) && stream->device == this_thread.device;
}

// Does the work of a stream, or records it.
cudaError_t enqueue(cudaStream_t stream, std::function<cudaError_t()> work) {
  if (!valid(stream)) return failed(cudaErrorInvalidResourceHandle);
  if (uint64_t(stream) > 2 && stream->capture) {
    stream->capture->work.push_back(std::move(work));
    return cudaSuccess;
  }
  if (uint64_t(stream) <= 1 && capturing()) return failed(cudaErrorStreamCaptureImplicit);
  return failed(work());
}

// The device's memory, and the variables of all modules.
Regions device_memory() {
  Regions regions;
  for (const auto& [address, allocation] : state().allocations) {
    if (allocation.device == this_thread.device) regions.add(address, allocation.bytes);
  }
  std::set<const FatBinary*> binaries;
  for (const auto& [host, kernel] : state().kernels) binaries.insert(kernel.binary);
  for (const FatBinary* binary : binaries) {
    for (const auto& module : binary->modules) {
      for (const auto& [name, variable] : module->variables) {
        regions.add(variable.address, variable.size);
      }
    }
  }
  return regions;
}

// The module with that kernel of the highest architecture that the device runs.
Module* module_for(const KernelFunction& function) {
  int cc = state().settings["cc"];
  Module* best = nullptr;
  for (const auto& module : function.binary->modules) {
    bool runs = module->only_target ? module->target == cc : module->target <= cc;
    if (!runs || !module->kernels.count(function.name)) continue;
    if (!best || module->target > best->target) best = module.get();
  }
  return best;
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? text : name;
  free(text);
  return result;
}

std::string list(const Dimensions& d) {
  return "[" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + "]";
}

struct LaunchRequest {
  const KernelFunction* function;
  Configuration configuration;
  cudaStream_t stream;
  std::vector<uint8_t> parameters;
};

void print(const LaunchRequest& request, const Launch& launch, double seconds) {
  const Statistics& s = launch.statistics;
  auto n = [](uint64_t x) { return static_cast<unsigned long long>(x); };
  fprintf(stderr,
          "ptxcpu: %s grid %s block %s shared %u: %.1f ms, warp instructions %llu, "
          "global loads %llu B in %llu sectors (distinct %llu), "
          "stores %llu B in %llu sectors (distinct %llu), shared wavefronts %llu (ideal %llu), "
          "flops %llu, mma flops %llu, barriers %llu\n",
          demangled(request.function->name).c_str(), list(request.configuration.grid).c_str(),
          list(request.configuration.block).c_str(), request.configuration.dynamic_shared,
          seconds * 1e3, n(s.warp_instructions), n(s.global_load_bytes), n(s.global_load_sectors),
          n(s.footprint_read_sectors), n(s.global_store_bytes), n(s.global_store_sectors),
          n(s.footprint_written_sectors), n(s.shared_wavefronts), n(s.shared_wavefronts_ideal),
          n(s.flops), n(s.mma_flops), n(s.barriers));
}

cudaError_t run(const LaunchRequest& request) {
  const KernelFunction& function = *request.function;
  Module& module = *module_for(function);
  Kernel& kernel = *module.kernel(function.name);
  Configuration configuration = request.configuration;
  const Settings& settings = state().settings;
  configuration.options = {settings["check"], settings["order"], bool(settings["statistics"]),
                           bool(settings["footprint"])};
  Regions regions = device_memory();
  Launch launch(module, kernel, configuration, regions, request.parameters.data());
  double begin = now();
  try {
    if (!kernel.error.empty()) fail(kernel.error);
    if (settings["execute"]) launch.run();
  } catch (const PtxError& error) {
    launch.statistics.errors++;
    launch.messages.push_back(error.what());
  }
  double seconds = now() - begin;
  cudaError_t status = launch.statistics.errors ? cudaErrorLaunchFailure : cudaSuccess;
  state().launches.push_back(
      "{\"kernel\": " + json_string(function.name) +
      ", \"name\": " + json_string(demangled(function.name)) +
      ", \"device\": " + std::to_string(this_thread.device) + ", \"stream\": " +
      std::to_string(uint64_t(request.stream)) + ", \"target\": " + std::to_string(module.target) +
      ", \"grid\": " + list(configuration.grid) + ", \"block\": " + list(configuration.block) +
      ", \"shared\": " + std::to_string(configuration.dynamic_shared) +
      ", \"status\": " + std::to_string(status) + ", \"seconds\": " + std::to_string(seconds) +
      ", " + json_fields(launch, module) + "}");
  if (settings["verbose"]) print(request, launch, seconds);
  for (const std::string& message : launch.messages) {
    fprintf(stderr, "ptxcpu: %s: %s\n", demangled(function.name).c_str(), message.c_str());
  }
  if (status != cudaSuccess && settings["abort"]) abort();
  return status;
}

cudaError_t launch_kernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared,
                          cudaStream_t stream) {
  auto it = state().kernels.find(host);
  if (it == state().kernels.end()) return failed(cudaErrorInvalidDeviceFunction);
  const KernelFunction& function = it->second;
  Module* module = module_for(function);
  if (!module) return failed(cudaErrorNoKernelImageForDevice);
  const Kernel& kernel = *module->kernel(function.name);
  Configuration configuration = {
      {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, uint32_t(shared), {}};
  uint64_t threads = configuration.block.count();
  if (threads == 0 || threads > 1024 || block.z > 64 || configuration.grid.count() == 0 ||
      grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    return failed(cudaErrorInvalidConfiguration);
  }
  if (threads > kernel.max_threads || shared > uint64_t(function.dynamic_shared) ||
      shared + kernel.shared_bytes > uint64_t(limits().block_shared())) {
    fprintf(stderr,
            "ptxcpu: %s: %llu threads (allowed %u), %zu bytes of dynamic shared memory (allowed "
            "%d)\n",
            demangled(function.name).c_str(), static_cast<unsigned long long>(threads),
            kernel.max_threads, shared, function.dynamic_shared);
    return failed(cudaErrorInvalidValue);
  }
  LaunchRequest request = {&function, configuration, stream, {}};
  request.parameters.resize(kernel.parameter_bytes + 16);
  for (size_t i = 0; i < kernel.parameters.size(); i++) {
    memcpy(&request.parameters[kernel.parameters[i].offset], arguments[i],
           kernel.parameters[i].size);
  }
  return enqueue(stream, [request = std::move(request)] { return run(request); });
}

bool on_device(const void* address, size_t bytes) {
  auto it = state().allocations.upper_bound(uint64_t(address));
  if (it == state().allocations.begin()) return false;
  --it;
  if (uint64_t(address) + bytes <= it->first + it->second.bytes) return true;
  return false;
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (to_device && !on_device(to, bytes)) return cudaErrorInvalidValue;
  if (from_device && !on_device(from, bytes)) return cudaErrorInvalidValue;
  memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t fill(void* to, int value, size_t bytes) {
  if (!on_device(to, bytes)) return cudaErrorInvalidValue;
  memset(to, value, bytes);
  return cudaSuccess;
}

uint8_t* symbol_address(const void* host, size_t bytes) {
  auto it = state().symbols.find(host);
  if (it == state().symbols.end()) return nullptr;
  for (const auto& module : it->second.binary->modules) {
    auto variable = module->variables.find(it->second.name);
    if (variable == module->variables.end() || bytes > variable->second.size) continue;
    return reinterpret_cast<uint8_t*>(variable->second.address);
  }
  return nullptr;
}

struct ErrorName {
  cudaError_t error;
  const char *name, *text;
};
constexpr ErrorName kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInvalidSymbol, "cudaErrorInvalidSymbol", "invalid device symbol"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure",
     "unspecified launch failure (the checks of ptxcpu)"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
};
const ErrorName& error_name(cudaError_t error) {
  static constexpr ErrorName kOther = {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"};
  for (const ErrorName& each : kErrors) {
    if (each.error == error) return each;
  }
  return kOther;
}

}  // namespace

// Names that programs with the per-thread default stream use.
#define PTXCPU_ALSO(name, other) decltype(name) other __attribute__((alias(#name)))

extern "C" {

// ---- what the code that nvcc generates calls ----

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const char* data;
    void* unused;
  };
  struct Header {
    uint32_t magic;
    uint16_t version, header_size;
    uint64_t size;
  };
  const char* data = static_cast<Wrapper*>(wrapper)->data;
  Header header;
  memcpy(&header, data, sizeof header);
  uint64_t size = header.header_size + header.size;
  constexpr char kPtx[] = ".version ";
  auto* binary = new FatBinary;
  for (uint64_t i = 0; i + sizeof kPtx < size; i++) {
    if (memcmp(data + i, kPtx, strlen(kPtx))) continue;
    std::string ptx(data + i, strnlen(data + i, size - i));
    i += ptx.size();
    try {
      binary->modules.push_back(parse_module(ptx));
    } catch (const std::exception& error) {
      fprintf(stderr, "ptxcpu: %s\n", error.what());
    }
  }
  if (binary->modules.empty()) {
    fprintf(stderr,
            "ptxcpu: no PTX in a program: build it with --no-compress and "
            "-gencode arch=compute_80,code=compute_80\n");
  }
  return reinterpret_cast<void**>(binary);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void** binary, const char* host, char*, const char* name, int, void*,
                            void*, void*, void*, int*) {
  PTXCPU_CALL;
  state().kernels[host] = {reinterpret_cast<FatBinary*>(binary), name};
}
void __cudaRegisterVar(void** binary, char* host, char*, const char* name, int, size_t, int, int) {
  PTXCPU_CALL;
  state().symbols[host] = {reinterpret_cast<FatBinary*>(binary), name};
}

struct LaunchConfiguration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local std::vector<LaunchConfiguration> launch_configurations;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  launch_configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  LaunchConfiguration last = launch_configurations.back();
  launch_configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  memcpy(stream, &last.stream, sizeof last.stream);
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(void** kernel, const void* host) {
  PTXCPU_CALL;
  *kernel = const_cast<void*>(host);
  return state().kernels.count(host) ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

// ---- launches and kernels ----

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t stream) {
  PTXCPU_CALL;
  return launch_kernel(kernel, grid, block, arguments, shared, stream);
}
PTXCPU_ALSO(cudaLaunchKernel, cudaLaunchKernel_ptsz);
PTXCPU_ALSO(cudaLaunchKernel, __cudaLaunchKernel);
PTXCPU_ALSO(cudaLaunchKernel, __cudaLaunchKernel_ptsz);

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* kernel,
                                void** arguments) {
  PTXCPU_CALL;
  return launch_kernel(kernel, how->gridDim, how->blockDim, arguments, how->dynamicSmemBytes,
                       how->stream);
}
PTXCPU_ALSO(cudaLaunchKernelExC, cudaLaunchKernelExC_ptsz);

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  PTXCPU_CALL;
  auto it = state().kernels.find(kernel);
  if (it == state().kernels.end()) return failed(cudaErrorInvalidDeviceFunction);
  if (!module_for(it->second)) return failed(cudaErrorNoKernelImageForDevice);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    const int fixed = int(module_for(it->second)->kernel(it->second.name)->shared_bytes);
    if (value < 0 || value + fixed > limits().block_shared()) return failed(cudaErrorInvalidValue);
    it->second.dynamic_shared = value;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  PTXCPU_CALL;
  auto it = state().kernels.find(kernel);
  if (it == state().kernels.end()) return failed(cudaErrorInvalidDeviceFunction);
  Module* module = module_for(it->second);
  if (!module) return failed(cudaErrorNoKernelImageForDevice);
  const Kernel& code = *module->kernel(it->second.name);
  memset(attributes, 0, sizeof *attributes);
  attributes->sharedSizeBytes = code.shared_bytes;
  attributes->maxThreadsPerBlock = int(code.max_threads);
  // PTX does not know; ptxas takes no more than these
  const int most = std::min<int>(255, kRegisters / (code.max_threads * code.min_blocks) & ~7);
  const int given = state().settings["registers"];
  attributes->numRegs = given ? given : most;
  attributes->ptxVersion = attributes->binaryVersion = module->target;
  attributes->maxDynamicSharedSizeBytes = it->second.dynamic_shared;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel,
                                                                   int threads, size_t shared,
                                                                   unsigned) {
  PTXCPU_CALL;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  const Limits most = limits();
  const int bytes = int(shared + attributes.sharedSizeBytes) + kReservedShared;
  const int of_block = std::max((threads + kLanes - 1) / kLanes * kLanes, 1);
  *blocks = std::min({most.threads / of_block, most.blocks, most.shared / bytes,
                      kRegisters / (of_block * attributes.numRegs)});
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, threads, shared, 0);
}

// ---- memory ----

cudaError_t cudaMalloc(void** address, size_t bytes) {
  PTXCPU_CALL;
  if (capturing()) return failed(cudaErrorStreamCaptureUnsupported);
  *address = nullptr;
  if (bytes == 0) return cudaSuccess;
  void* memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (!memory) return failed(cudaErrorMemoryAllocation);
  memset(memory, 0xff, bytes);  // NaN, whatever the format
  state().allocations[uint64_t(memory)] = {bytes, this_thread.device, true};
  *address = memory;
  return cudaSuccess;
}
cudaError_t cudaMallocManaged(void** address, size_t bytes, unsigned) {
  return cudaMalloc(address, bytes);
}
cudaError_t cudaFree(void* address) {
  PTXCPU_CALL;
  if (!address) return cudaSuccess;
  if (capturing()) return failed(cudaErrorStreamCaptureUnsupported);
  auto it = state().allocations.find(uint64_t(address));
  if (it == state().allocations.end() || !it->second.owned) return failed(cudaErrorInvalidValue);
  state().allocations.erase(it);
  free(address);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** address, size_t bytes, cudaStream_t) {
  return cudaMalloc(address, bytes);
}
PTXCPU_ALSO(cudaMallocAsync, cudaMallocAsync_ptsz);
cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return cudaFree(address); }
PTXCPU_ALSO(cudaFreeAsync, cudaFreeAsync_ptsz);
cudaError_t cudaMallocHost(void** address, size_t bytes) {
  *address = malloc(bytes);
  return *address ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void* address) {
  free(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  PTXCPU_CALL;
  return enqueue(nullptr, [=] { return copy(to, from, bytes, kind); });
}
PTXCPU_ALSO(cudaMemcpy, cudaMemcpy_ptds);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  PTXCPU_CALL;
  return enqueue(stream, [=] { return copy(to, from, bytes, kind); });
}
PTXCPU_ALSO(cudaMemcpyAsync, cudaMemcpyAsync_ptsz);
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  PTXCPU_CALL;
  return enqueue(nullptr, [=] { return fill(to, value, bytes); });
}
PTXCPU_ALSO(cudaMemset, cudaMemset_ptds);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  PTXCPU_CALL;
  return enqueue(stream, [=] { return fill(to, value, bytes); });
}
PTXCPU_ALSO(cudaMemsetAsync, cudaMemsetAsync_ptsz);

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  PTXCPU_CALL;
  memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeUnregistered;
  if (!on_device(address, 1)) return cudaSuccess;
  attributes->type = cudaMemoryTypeDevice;
  attributes->device = std::prev(state().allocations.upper_bound(uint64_t(address)))->second.device;
  attributes->devicePointer = const_cast<void*>(address);
  return cudaSuccess;
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                               cudaMemcpyKind) {
  PTXCPU_CALL;
  uint8_t* place = symbol_address(symbol, offset + bytes);
  if (!place) return failed(cudaErrorInvalidSymbol);
  for (const auto& module : state().symbols[symbol].binary->modules) {
    auto it = module->variables.find(state().symbols[symbol].name);
    if (it == module->variables.end()) continue;
    memcpy(reinterpret_cast<uint8_t*>(it->second.address) + offset, from, bytes);
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset,
                                 cudaMemcpyKind) {
  PTXCPU_CALL;
  uint8_t* place = symbol_address(symbol, offset + bytes);
  if (!place) return failed(cudaErrorInvalidSymbol);
  memcpy(to, place + offset, bytes);
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  PTXCPU_CALL;
  *address = symbol_address(symbol, 0);
  return *address ? cudaSuccess : failed(cudaErrorInvalidSymbol);
}

// ---- errors ----

cudaError_t cudaGetLastError() { return std::exchange(this_thread.last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return this_thread.last_error; }
const char* cudaGetErrorString(cudaError_t error) { return error_name(error).text; }
const char* cudaGetErrorName(cudaError_t error) { return error_name(error).name; }

// ---- devices ----

cudaError_t cudaGetDevice(int* device) {
  *device = this_thread.device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  PTXCPU_CALL;
  if (device < 0 || device >= state().settings["devices"]) return failed(cudaErrorInvalidDevice);
  this_thread.device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* devices) {
  *devices = state().settings["devices"];
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  PTXCPU_CALL;
  if (device < 0 || device >= state().settings["devices"]) return failed(cudaErrorInvalidDevice);
  int cc = state().settings["cc"];
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = limits().block_shared(); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = limits().shared; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = kReservedShared; break;
    case cudaDevAttrWarpSize: *value = kLanes; break;
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors(); break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = limits().threads; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = limits().blocks; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = kRegisters; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = kRegisters; break;
    case cudaDevAttrComputeCapabilityMajor: *value = cc / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = cc % 10; break;
    case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; break;
    case cudaDevAttrMaxGridDimY: *value = 65535; break;
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    default: *value = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  PTXCPU_CALL;
  if (device < 0 || device >= state().settings["devices"]) return failed(cudaErrorInvalidDevice);
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "ptxcpu");
  properties->major = state().settings["cc"] / 10;
  properties->minor = state().settings["cc"] % 10;
  properties->warpSize = kLanes;
  properties->multiProcessorCount = multiprocessors();
  properties->sharedMemPerBlock = 48 * 1024;
  properties->sharedMemPerBlockOptin = limits().block_shared();
  properties->sharedMemPerMultiprocessor = limits().shared;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = limits().threads;
  properties->totalGlobalMem = 8ull << 30;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  PTXCPU_CALL;
  return capturing() ? failed(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = state().settings["driver"];
  return cudaSuccess;
}

// ---- streams, events and graphs ----

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  PTXCPU_CALL;
  *stream = new CUstream_st{this_thread.device};
  state().streams.insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  PTXCPU_CALL;
  if (!state().streams.erase(stream)) return failed(cudaErrorInvalidResourceHandle);
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  PTXCPU_CALL;
  if (uint64_t(stream) > 2 && !state().streams.count(stream)) {
    return failed(cudaErrorInvalidResourceHandle);
  }
  bool captures = uint64_t(stream) > 2 && stream->capture;
  return captures ? failed(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
PTXCPU_ALSO(cudaStreamSynchronize, cudaStreamSynchronize_ptsz);
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
PTXCPU_ALSO(cudaStreamWaitEvent, cudaStreamWaitEvent_ptsz);

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  PTXCPU_CALL;
  bool captures = uint64_t(stream) > 2 && stream->capture;
  *status = captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
PTXCPU_ALSO(cudaStreamIsCapturing, cudaStreamIsCapturing_ptsz);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  PTXCPU_CALL;
  if (uint64_t(stream) <= 2 || !valid(stream)) return failed(cudaErrorStreamCaptureUnsupported);
  stream->capture = new CUgraph_st;
  return cudaSuccess;
}
PTXCPU_ALSO(cudaStreamBeginCapture, cudaStreamBeginCapture_ptsz);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  PTXCPU_CALL;
  if (!valid(stream) || !stream->capture) return failed(cudaErrorInvalidValue);
  *graph = std::exchange(stream->capture, nullptr);
  return cudaSuccess;
}
PTXCPU_ALSO(cudaStreamEndCapture, cudaStreamEndCapture_ptsz);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
  PTXCPU_CALL;
  *executable = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  PTXCPU_CALL;
  return enqueue(stream, [work = executable->work] {
    for (const auto& each : work) {
      cudaError_t error = each();
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
}
PTXCPU_ALSO(cudaGraphLaunch, cudaGraphLaunch_ptsz);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return cudaEventCreate(event);
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  event->seconds = now();
  return cudaSuccess;
}
PTXCPU_ALSO(cudaEventRecord, cudaEventRecord_ptsz);
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = float((end->seconds - begin->seconds) * 1e3);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

// ---- for runtime.py ----

// A setting of Settings; 0 if there is none of that name.
int ptxcpu_configure(const char* name, int value) {
  PTXCPU_CALL;
  auto it = state().settings.values.find(name);
  if (it == state().settings.values.end()) return 0;
  it->second = value;
  return 1;
}

// Lends memory of the host to the current device.
void ptxcpu_register(const void* address, size_t bytes) {
  PTXCPU_CALL;
  if (bytes) state().allocations[uint64_t(address)] = {bytes, this_thread.device, false};
}
void ptxcpu_unregister(const void* address) {
  PTXCPU_CALL;
  state().allocations.erase(uint64_t(address));
}

// {"launches": [...], "calls": {function: count}} since ptxcpu_reset_stats, valid until the next
// call.
const char* ptxcpu_stats_json() {
  PTXCPU_CALL;
  std::string launches, calls;
  for (const std::string& each : state().launches)
    launches += (launches.empty() ? "" : ", ") + each;
  for (const auto& [name, times] : state().calls) {
    calls += (calls.empty() ? "" : ", ") + json_string(name) + ": " + std::to_string(times);
  }
  state().json = "{\"launches\": [" + launches + "], \"calls\": {" + calls + "}}";
  return state().json.c_str();
}
void ptxcpu_reset_stats() {
  PTXCPU_CALL;
  state().launches.clear();
  state().calls.clear();
}
}
