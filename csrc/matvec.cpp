// The entry point of the product of a weight with a few vectors.
#include "run.h"

using namespace rwkv6;

const char* rwkv6_matvec(const rwkv6_context* context, const DLTensor* x, const DLTensor* weight,
                         DLTensor* y) {
  return message_of([&] {
    const DType dtype = dtype_of("x", x);
    MatvecJob job = {};
    job.x = matrix("x", x, -1, -1, dtype);
    job.M = x->shape[0], job.K = x->shape[1];
    job.weight = matrix("weight", weight, -1, job.K, dtype);
    job.N = weight->shape[0];
    job.y = matrix("y", y, job.M, job.N, dtype);
    check_writable("y", y);
    if (job.M && job.N) Threads(context, job.M * job.N * job.K).run(job, kernels(dtype).matvec);
  });
}
