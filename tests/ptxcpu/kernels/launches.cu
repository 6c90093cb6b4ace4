// Host code that launches kernels, for the stand-in runtime.
#include <cuda_runtime.h>

__device__ float offset;

template <class T>
__global__ void add(T* y, const T* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] += x[i] + T(offset);
}

__global__ void read_twice(float* y, const float* x) {
  float sum = 0;
  for (int i = 0; i < 2; i++) sum += __ldcg(x + (threadIdx.x + 32 * i) % 32);
  y[threadIdx.x] = sum;
}

__global__ void dynamic(float* y) {
  extern __shared__ float shared[];
  shared[blockDim.x * 63 + threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = shared[blockDim.x * 63 + threadIdx.x];
}

extern "C" {

int set_offset(float value) { return cudaMemcpyToSymbol(offset, &value, sizeof value); }

int add_float(float* y, const float* x, int n, cudaStream_t stream) {
  add<<<(n + 127) / 128, 128, 0, stream>>>(y, x, n);
  return cudaGetLastError();
}

int add_double(double* y, const double* x, int n, cudaStream_t stream) {
  add<<<(n + 127) / 128, 128, 0, stream>>>(y, x, n);
  return cudaGetLastError();
}

int read_twice_float(float* y, const float* x) {
  read_twice<<<1, 32>>>(y, x);
  return cudaGetLastError();
}

// 64 kB of dynamic shared memory
int dynamic_float(float* y, int ask_for_it) {
  int bytes = 64 * 1024;
  if (ask_for_it) {
    cudaFuncSetAttribute(dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  dynamic<<<1, 256, bytes>>>(y);
  return cudaGetLastError();
}

// Adds x to y times over, by a graph of one launch.
int add_by_graph(float* y, const float* x, int n, int times) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaStreamCreate(&stream);
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  void* memory;
  int refused = cudaMalloc(&memory, 4);  // not allowed meanwhile
  add<<<(n + 127) / 128, 128, 0, stream>>>(y, x, n);
  cudaStreamEndCapture(stream, &graph);
  cudaGraphInstantiate(&executable, graph, 0);
  for (int i = 0; i < times; i++) cudaGraphLaunch(executable, stream);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  cudaGetLastError();
  return refused;
}
}
