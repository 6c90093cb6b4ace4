// The entry point of one token through one layer of RWKV-6.
#include <utility>

#include "run.h"

namespace rwkv6 {
namespace {

void decode_layer(const rwkv6_context* context, const rwkv6_layer* from, const DLTensor* x,
                  DLTensor* att_shift, DLTensor* wkv, DLTensor* ffn_shift, DLTensor* y) {
  const rwkv6_layer& p = *from;
  LayerJob job = {};
  const DType dtype = job.dtype = dtype_of("x", x);
  job.x = matrix("x", x, -1, -1, dtype);
  const int64_t M = job.M = x->shape[0], D = job.D = x->shape[1];
  job.y = matrix("y", y, M, D, dtype);
  job.att_shift = matrix("att_shift", att_shift, M, D, dtype);
  job.ffn_shift = matrix("ffn_shift", ffn_shift, M, D, dtype);

  const int64_t H = job.H = size_of("att.time_faaaa", p.att_time_faaaa, 0);
  const int64_t N = job.N = size_of("att.time_faaaa", p.att_time_faaaa, -1);
  const int64_t F = job.F = size_of("ffn.key", p.ffn_key, 0);
  const int64_t mix_rank = job.mix_rank = size_of("att.time_maa_w1", p.att_time_maa_w1, -1) / 5;
  const int64_t decay_rank = job.decay_rank = size_of("att.time_decay_w1", p.att_time_decay_w1, -1);
  if (D < 1 || H * N != D || N > kMaxHeadSize)
    throw ArgumentError("att.time_faaaa: expected [H, N] with H * N = " + std::to_string(D) +
                        " and N up to " + std::to_string(kMaxHeadSize));
  const DType acc = state_dtype(dtype);
  const Shape shape = {M, 1, H, N, Device()};
  job.wkv = states("wkv", wkv, M, shape, acc, acc);
  const auto read = [&](const char* name, const DLTensor* x, std::initializer_list<int64_t> shape) {
    return parameter(name, x, shape, dtype);
  };
  job.ln1_weight = read("ln1.weight", p.ln1_weight, {D});
  job.ln1_bias = read("ln1.bias", p.ln1_bias, {D});
  job.maa_x = read("att.time_maa_x", p.att_time_maa_x, {D});
  job.maa_w = read("att.time_maa_w", p.att_time_maa_w, {D});
  job.maa_k = read("att.time_maa_k", p.att_time_maa_k, {D});
  job.maa_v = read("att.time_maa_v", p.att_time_maa_v, {D});
  job.maa_r = read("att.time_maa_r", p.att_time_maa_r, {D});
  job.maa_g = read("att.time_maa_g", p.att_time_maa_g, {D});
  job.maa_w1 = read("att.time_maa_w1", p.att_time_maa_w1, {D, 5 * mix_rank});
  job.maa_w2 = read("att.time_maa_w2", p.att_time_maa_w2, {5, mix_rank, D});
  job.time_decay = read("att.time_decay", p.att_time_decay, {D});
  job.decay_w1 = read("att.time_decay_w1", p.att_time_decay_w1, {D, decay_rank});
  job.decay_w2 = read("att.time_decay_w2", p.att_time_decay_w2, {decay_rank, D});
  job.time_faaaa = read("att.time_faaaa", p.att_time_faaaa, {H, N});
  job.receptance = read("att.receptance", p.att_receptance, {D, D});
  job.key = read("att.key", p.att_key, {D, D});
  job.value = read("att.value", p.att_value, {D, D});
  job.gate = read("att.gate", p.att_gate, {D, D});
  job.output = read("att.output", p.att_output, {D, D});
  job.ln_x_weight = read("att.ln_x.weight", p.att_ln_x_weight, {D});
  job.ln_x_bias = read("att.ln_x.bias", p.att_ln_x_bias, {D});
  job.ln2_weight = read("ln2.weight", p.ln2_weight, {D});
  job.ln2_bias = read("ln2.bias", p.ln2_bias, {D});
  job.ffn_maa_k = read("ffn.time_maa_k", p.ffn_time_maa_k, {D});
  job.ffn_maa_r = read("ffn.time_maa_r", p.ffn_time_maa_r, {D});
  job.ffn_key = read("ffn.key", p.ffn_key, {F, D});
  job.ffn_receptance = read("ffn.receptance", p.ffn_receptance, {D, D});
  job.ffn_value = read("ffn.value", p.ffn_value, {D, F});
  job.ln_eps = p.ln_eps, job.ln_x_eps = p.ln_x_eps;

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
  const std::vector<Sequence> steps =
      Walk(shape, nullptr, nullptr, StateUse::update, wkv).sequences();
  job.sequences = steps.data();
  if (Threads(context, M * D * D).many()) {
    job.parallel_for = context->parallel_for;
    job.pool = context->pool;
  }
  kernels(dtype).layer(job);
}

}  // namespace
}  // namespace rwkv6

const char* rwkv6_decode_layer(const rwkv6_context* context, const rwkv6_layer* layer,
                               const DLTensor* x, DLTensor* att_shift, DLTensor* wkv,
                               DLTensor* ffn_shift, DLTensor* y) {
  return rwkv6::message_of(
      [&] { rwkv6::decode_layer(context, layer, x, att_shift, wkv, ffn_shift, y); });
}
