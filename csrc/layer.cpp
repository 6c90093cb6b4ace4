// The entry point of one token through one layer of RWKV-6.
#include <utility>

#include "run.h"

using namespace rwkv6;

const char* rwkv6_decode_layer(const rwkv6_context* context, const rwkv6_layer* layer,
                               const DLTensor* x, DLTensor* att_shift, DLTensor* wkv,
                               DLTensor* ffn_shift, DLTensor* y) {
  return message_of([&] {
    const rwkv6_layer& from = required("layer", layer);
    LayerJob job = {};
    const DType dtype = job.dtype = dtype_of("x", x);
    job.x = matrix("x", x, -1, -1, dtype);
    const int64_t M = job.M = x->shape[0], D = job.D = x->shape[1];
    job.y = matrix("y", y, M, D, dtype);
    job.att_shift = matrix("att_shift", att_shift, M, D, dtype);
    job.ffn_shift = matrix("ffn_shift", ffn_shift, M, D, dtype);

    const int64_t H = job.H = dimension_size("att.time_faaaa", from.att_time_faaaa, 0);
    const int64_t N = job.N = dimension_size("att.time_faaaa", from.att_time_faaaa, -1);
    const int64_t F = job.F = dimension_size("ffn.key.weight", from.ffn_key, 0);
    const int64_t mix_rank = job.mix_rank =
        dimension_size("att.time_maa_w1", from.att_time_maa_w1, -1) / 5;
    const int64_t decay_rank = job.decay_rank =
        dimension_size("att.time_decay_w1", from.att_time_decay_w1, -1);
    if (D < 1 || H * N != D || N > kMaxHeadSize)
      throw ArgumentError("att.time_faaaa: expected [H, N] with H * N = " + std::to_string(D) +
                          " and N up to " + std::to_string(kMaxHeadSize));
    const DType acc = state_dtype(dtype);
    const Sizes sizes = {M, 1, H, N, Device()};
    job.wkv = states("wkv", wkv, M, sizes, acc, acc);
    // A matrix with a scale is int8.
    const auto matrix_of = [&](const char* name, const DLTensor* x, const DLTensor* scale,
                               int64_t rows, int64_t columns, const float*& scales) {
      if (!scale) return parameter(name, x, {rows, columns}, dtype);
      scales = row_scales((std::string(name) + "'s scale").c_str(), scale, rows);
      return parameter(name, x, {rows, columns}, DType::i8);
    };
#define RWKV6_LAYER_PARAMETER(field, name, ...) \
  job.field = parameter(name, from.field, {__VA_ARGS__}, dtype);
#define RWKV6_LAYER_MATRIX(field, name, rows, columns) \
  job.field = matrix_of(name, from.field, from.field##_scale, rows, columns, job.field##_scale);
#include "rwkv6_layer_parameters.inc"
    job.ln_eps = from.ln_eps, job.ln_x_eps = from.ln_x_eps;

    for (const auto& [name, written] :
         {std::pair("att_shift", att_shift), {"wkv", wkv}, {"ffn_shift", ffn_shift}, {"y", y}})
      check_writable(name, written);
    for (const auto& [name, updated] :
         {std::pair("att_shift", att_shift), {"wkv", wkv}, {"ffn_shift", ffn_shift}})
      check_apart(name, updated, "x", x);
    check_apart("att_shift", att_shift, "ffn_shift", ffn_shift);
    check_apart("wkv", wkv, "att_shift", att_shift);
    check_apart("wkv", wkv, "ffn_shift", ffn_shift);

    if (!M) return;
    const std::vector<Sequence> list =
        read_sequences(check_sequences(sizes, nullptr, nullptr, wkv, true));
    job.list = list.data();
    if (Threads(context, M * D * D).many()) {
      job.parallel_for = context->parallel_for;
      job.pool = context->pool;
    }
    kernels(dtype).layer(job);
  });
}
