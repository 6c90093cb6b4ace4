// CUDA's own arithmetic, for the test of sass.occupancy: reads lines of
//   major minor blocks' limits: multiprocessor's threads, shared memory; then threads, registers,
//   static and dynamic shared memory of a kernel
// and writes how many blocks a multiprocessor holds.
#include <cuda_occupancy.h>
#include <cuda_runtime_api.h>

#include <cstdio>

int main() {
  int major, minor, most_threads, threads, registers;
  size_t most_shared, fixed, dynamic;
  while (scanf("%d %d %d %zu %d %d %zu %zu", &major, &minor, &most_threads, &most_shared, &threads,
               &registers, &fixed, &dynamic) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = most_threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.sharedMemPerMultiprocessor = most_shared;
    device.sharedMemPerBlockOptin = most_shared - 1024;
    device.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = fixed;
    kernel.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads,
                                                dynamic) != CUDA_OCC_SUCCESS) {
      return 1;
    }
    printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
