// The kernel library's C interface: WKV6, and RWKV-4's operator, over DLPack tensors.
//
// It knows no framework. torch, JAX, NumPy or C++ programs describe their own memory with DLTensor
// and the library reads and writes it in place. Every function checks its arguments, computes and
// returns NULL, or returns a message that says what was wrong and leaves all outputs untouched (but
// for gradients, when memory runs out half-way). The message belongs to the calling thread and
// lasts until its next call. Nothing aborts or throws.
//
// Shapes: B batch rows, T tokens, H heads, N head size (1 to 256), S states, M packed sequences.
// Strides are arbitrary as long as the last dimension is contiguous; output tensors must not
// overlap themselves, each other or the inputs. Optional tensors may be NULL. Structs are to be
// initialised to zero before their fields are set, so that what a later version adds is absent.
//
// WKV6 takes tensors that are all on the CPU, or all on one CUDA device; everything else is computed
// on the CPU. On a GPU a call only launches kernels: it returns before they are done, and it looks
// at no value. There a sequence whose entry of state_map is out of range gets NaN, and so does every
// sequence if cu_seqlens does not rise from 0 to T; no memory outside the tensors is touched.
#pragma once

#include <ATen/dlpack.h>  // the DLPack header, as torch's wheel ships it

#if defined(_WIN32)
#define RWKV6_API __declspec(dllexport)
#else
#define RWKV6_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// The largest head size N.
enum { RWKV6_MAX_HEAD_SIZE = 256 };

// What the caller's framework lends to a call. A NULL context computes on the calling thread; for
// tensors on a GPU, stream and allocate are needed and the rest is not looked at.
typedef struct {
  // Runs body(data, begin, end) so that the ranges cover [0, n) once, in any order and on any
  // threads, and returns when all are done. Results do not depend on how the work is cut.
  void (*parallel_for)(void* pool, int64_t n, void (*body)(void* data, int64_t begin, int64_t end),
                       void* data);
  void* pool;
  int num_threads;  // how many threads parallel_for has; work is cut to keep that many busy

  void* stream;  // the cudaStream_t to launch on; nothing waits for it
  // Uninitialised memory of the tensors' device, aligned to 256 bytes, that stays until the kernels
  // this call has launched are done. NULL when there is too little.
  void* (*allocate)(void* pool, size_t bytes);
} rwkv6_context;

// What WKV6 is computed from:
//
//   y_t[j]  = sum_i r_t[i] * (S[i][j] + u[i] * k_t[i] * v_t[j])
//   S[i][j] = exp(-exp(w_t[i])) * S[i][j] + k_t[i] * v_t[j]
typedef struct {
  const DLTensor* r;              // [B, T, H, N], f64 f32 bf16 f16
  const DLTensor* k;              // [B, T, H, N], as r
  const DLTensor* v;              // [B, T, H, N], as r
  const DLTensor* w;              // [B, T, H, N], as r or f32
  const DLTensor* u;              // [H, N], or [B, H, N] for one per batch row, as r or f32
  const DLTensor* initial_state;  // [S, H, N, N] or NULL (zeros), f32 (f64 for f64) or as r
  const DLTensor* state_map;      // [B] or [M], or NULL, i32 i64
  const DLTensor* cu_seqlens;     // [M + 1] or NULL, i32 i64
} rwkv6_wkv_inputs;

// A forward whose backward follows may keep the states that the backward needs: of every sequence
// those before its tokens 128, 256, ... With P = T / 128, rounded down, the state before token t of a
// sequence that begins at token `begin` of batch row b is row b P + (begin + t) / 128 - 1. There may
// be more rows than B P; rows of no state are left as they are.
#define RWKV6_CHECKPOINT_TOKENS 128

// With y NULL it computes the final state alone, in less time: the same bits on the CPU. r, u
// and checkpoints are NULL then.
RWKV6_API const char* rwkv6_wkv_forward(
    const rwkv6_context* context, const rwkv6_wkv_inputs* inputs,
    DLTensor* y,             // [B, T, H, N], as r, or NULL
    DLTensor* final_state,   // [B or M, H, N, N], f32 (f64 for f64)
    DLTensor* checkpoints);  // [B P, H, N, N] or NULL (none are kept), f32 (f64 for f64)

// The gradients of the inputs, each of its input's shape and dtype.
typedef struct {
  DLTensor* grad_r;              // [B, T, H, N]
  DLTensor* grad_k;              // [B, T, H, N]
  DLTensor* grad_v;              // [B, T, H, N]
  DLTensor* grad_w;              // [B, T, H, N]
  DLTensor* grad_u;              // [H, N], or [B, H, N]: each batch row's share, whatever u's shape
  DLTensor* grad_initial_state;  // [S, H, N, N]; NULL when initial_state is
} rwkv6_wkv_gradients;

RWKV6_API const char* rwkv6_wkv_backward(
    const rwkv6_context* context, const rwkv6_wkv_inputs* inputs,
    const DLTensor* checkpoints,       // as the forward kept them, or NULL (they are recomputed)
    const DLTensor* grad_y,            // [B, T, H, N] or NULL (zeros), as r
    const DLTensor* grad_final_state,  // [B or M, H, N, N] or NULL (zeros), f32 (f64 for f64)
    const rwkv6_wkv_gradients* gradients);

// As forward, but reads and writes rows of `state`; inputs->initial_state is NULL. A negative entry
// of state_map is a padding row: its y is zero and no state is touched. The other entries must be
// distinct. Without state_map, S is the number of sequences.
RWKV6_API const char* rwkv6_wkv_update(const rwkv6_context* context, const rwkv6_wkv_inputs* inputs,
                                       DLTensor* state,  // [S, H, N, N], f32 (f64 for f64)
                                       DLTensor* y);     // [B, T, H, N], as r

// What RWKV-4's operator is computed from. Every channel has an average of the values so far, in
// which token s has the weight e^k_s, and every later token multiplies that weight by e^-exp(w).
// For the current token u is added to its key. D channels, of any number:
//
//   y_t     = (a e^p + e^(u + k_t) v_t) / (b e^p + e^(u + k_t))
//   a e^p  <- e^(p - exp(w)) a + e^k_t v_t
//   b e^p  <- e^(p - exp(w)) b + e^k_t
//
// where p is the larger exponent of the two terms of the sum, so that nothing overflows.
typedef struct {
  const DLTensor* k;              // [B, T, D], f64 f32 bf16 f16
  const DLTensor* v;              // [B, T, D], as k
  const DLTensor* w;              // [D], as k or f32
  const DLTensor* u;              // [D], as k or f32
  const DLTensor* initial_state;  // [B, 3, D] or NULL: a, b and p, f32 (f64 for f64)
} rwkv6_wkv4_inputs;

RWKV6_API const char* rwkv6_wkv4_forward(const rwkv6_context* context,
                                         const rwkv6_wkv4_inputs* inputs,
                                         DLTensor* y,             // [B, T, D], as k
                                         DLTensor* final_state);  // [B, 3, D], f32 (f64 for f64)

// The gradients of the inputs, each of its input's shape and dtype.
typedef struct {
  DLTensor* grad_k;              // [B, T, D]
  DLTensor* grad_v;              // [B, T, D]
  DLTensor* grad_w;              // [D]
  DLTensor* grad_u;              // [D]
  DLTensor* grad_initial_state;  // [B, 3, D] or NULL: not wanted
} rwkv6_wkv4_gradients;

RWKV6_API const char* rwkv6_wkv4_backward(
    const rwkv6_context* context, const rwkv6_wkv4_inputs* inputs,
    const DLTensor* grad_y,            // [B, T, D] or NULL (zeros), as k
    const DLTensor* grad_final_state,  // [B, 3, D] or NULL (zeros), f32 (f64 for f64)
    const rwkv6_wkv4_gradients* gradients);

// As forward, but reads and writes `state`; inputs->initial_state is NULL.
RWKV6_API const char* rwkv6_wkv4_update(const rwkv6_context* context,
                                        const rwkv6_wkv4_inputs* inputs,
                                        DLTensor* state,  // [B, 3, D], f32 (f64 for f64)
                                        DLTensor* y);     // [B, T, D], as k

// y = x weight^T, for a few rows of x: at the speed that the weight can be read. 16-bit inputs are
// summed in f32.
RWKV6_API const char* rwkv6_matvec(const rwkv6_context* context,
                                   const DLTensor* x,       // [M, K], f64 f32 bf16 f16
                                   const DLTensor* weight,  // [N, K], as x
                                   DLTensor* y);            // [M, N], as x

// The same with a weight of int8: row n of it stands for scale[n] times its numbers.
RWKV6_API const char* rwkv6_matvec_int8(const rwkv6_context* context,
                                        const DLTensor* x,       // [M, K], f64 f32 bf16 f16
                                        const DLTensor* weight,  // [N, K], int8
                                        const DLTensor* scale,   // [N], f32, dense
                                        DLTensor* y);            // [M, N], as x

// The parameters of one layer of RWKV-6: rwkv6_layer_parameters.inc lists them with their shapes.
// All are dense (but for dimensions of 1 in front, which do not count) and of one dtype, f64 f32
// bf16 f16. Each matrix may be int8 instead; then its _scale is there, [rows], f32, dense, and row n
// of the matrix stands for _scale[n] times its numbers. Otherwise _scale is NULL.
typedef struct {
#define RWKV6_LAYER_PARAMETER(field, name, ...) const DLTensor* field;
#define RWKV6_LAYER_MATRIX(field, name, rows, columns) \
  const DLTensor* field;                               \
  const DLTensor* field##_scale;
#include "rwkv6_layer_parameters.inc"
  double ln_eps;  // of ln1 and ln2
  double ln_x_eps;
} rwkv6_layer;

// One token of each of B sequences through one layer, time mixing and channel mixing: decoding, at
// the speed that the weights can be read. Everything in between is f32 (f64 for f64).
RWKV6_API const char* rwkv6_decode_layer(const rwkv6_context* context, const rwkv6_layer* layer,
                                         const DLTensor* x,    // [B, D], residual stream
                                         DLTensor* att_shift,  // [B, D], updated
                                         DLTensor* wkv,        // [B, H, N, N], f32 (f64 for f64)
                                         DLTensor* ffn_shift,  // [B, D], updated
                                         DLTensor* y);         // [B, D]

// The instruction set the CPU kernels use in this process: "baseline", "avx2" or "avx512" on
// x86-64, "neon" on AArch64, "baseline" elsewhere. The environment variable RWKV6_CPU_ISA forces
// one; NULL if it names one that is not available.
RWKV6_API const char* rwkv6_cpu_isa(void);

// The compute capabilities that the CUDA kernels were compiled for, such as "8.0, 9.0"; NULL where
// the library was built without CUDA. The environment variable RWKV6_CUDA_KERNEL, "recurrent" or
// "chunked", forces one of the two families of kernels.
RWKV6_API const char* rwkv6_cuda_architectures(void);

// Why the CUDA kernels cannot run here, as far as can be told without a GPU: the library was built
// without them, or the driver is older than the CUDA that they were built with. NULL otherwise.
// Valid until the thread's next call.
RWKV6_API const char* rwkv6_cuda_problem(void);

// The calling thread's current CUDA device; -1 without one.
RWKV6_API int rwkv6_cuda_current_device(void);

#ifdef __cplusplus
}
#endif
