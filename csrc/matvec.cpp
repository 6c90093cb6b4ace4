// The entry point of the product of a weight with a few vectors.
#include "run.h"

namespace rwkv6 {
namespace {

void run(const rwkv6_context* context, const DLTensor* x, const DLTensor* weight,
         const DLTensor* scale, bool quantised, DLTensor* y) {
  const DType dtype = dtype_of("x", x);
  MatvecJob job = {};
  job.x = matrix("x", x, -1, -1, dtype);
  job.M = x->shape[0], job.K = x->shape[1];
  job.weight = quantised ? int8_matrix("weight", weight, -1, job.K)
                         : matrix("weight", weight, -1, job.K, dtype);
  job.N = weight->shape[0];
  if (quantised) job.scale = row_scales("scale", scale, job.N);
  job.y = matrix("y", y, job.M, job.N, dtype);
  check_writable("y", y);
  if (job.M && job.N) Threads(context, job.M * job.N * job.K).run(job, kernels(dtype).matvec);
}

}  // namespace
}  // namespace rwkv6

using namespace rwkv6;

const char* rwkv6_matvec(const rwkv6_context* context, const DLTensor* x, const DLTensor* weight,
                         DLTensor* y) {
  return message_of([&] { run(context, x, weight, nullptr, false, y); });
}

const char* rwkv6_matvec_int8(const rwkv6_context* context, const DLTensor* x,
                              const DLTensor* weight, const DLTensor* scale, DLTensor* y) {
  return message_of([&] { run(context, x, weight, scale, true, y); });
}
