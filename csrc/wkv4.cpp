// The entry points of RWKV-4's operator.
#include <memory>
#include <numeric>
#include <utility>

#include "run.h"

namespace rwkv6 {
namespace {

// About what one token and channel costs, in the multiply-adds that kWorthThreads counts.
constexpr int64_t kWorkOfStep = 64;

// What every entry point is given, checked.
struct Wkv4Inputs {
  Shape shape;
  DType dtype, acc;
  Wkv4Job job = {};

  Wkv4Inputs(const DLTensor* k, const DLTensor* v, const DLTensor* w, const DLTensor* u)
      : shape(check_channels("k", k)), dtype(dtype_of("k", k)), acc(state_dtype(dtype)) {
    job.B = shape.B, job.T = shape.T, job.D = shape.N;
    job.k = channel_tokens("k", k, shape, dtype);
    job.v = channel_tokens("v", v, shape, dtype);
    job.w = channel_vector("w", w, shape, dtype, DType::f32);
    job.u = channel_vector("u", u, shape, dtype, DType::f32);
  }

  void cut_and_run(const rwkv6_context* context, void (*kernel)(const Wkv4Job&, int64_t, int64_t)) {
    if (!shape.B || !shape.N) return;
    const Threads threads(context, shape.B * (shape.T + 1) * shape.N * kWorkOfStep);
    job.parts = threads.parts(shape.B, shape.N, kernels(dtype).columns, 0);
    run(threads, job, kernel);
  }
};

void forward4(const rwkv6_context* context, const DLTensor* k, const DLTensor* v, const DLTensor* w,
              const DLTensor* u, const DLTensor* initial_state, DLTensor* y,
              DLTensor* final_state) {
  Wkv4Inputs in(k, v, w, u);
  if (initial_state)
    in.job.initial = channel_states("initial_state", initial_state, in.shape, in.acc);
  in.job.y = channel_tokens("y", y, in.shape, in.dtype);
  in.job.final = channel_states("final_state", final_state, in.shape, in.acc);
  check_writable("y", y);
  check_writable("final_state", final_state);
  in.cut_and_run(context, kernels(in.dtype).wkv4_forward);
}

void update4(const rwkv6_context* context, const DLTensor* k, const DLTensor* v, const DLTensor* w,
             const DLTensor* u, DLTensor* state, DLTensor* y) {
  Wkv4Inputs in(k, v, w, u);
  in.job.initial = in.job.final = channel_states("state", state, in.shape, in.acc);
  in.job.y = channel_tokens("y", y, in.shape, in.dtype);
  check_writable("y", y);
  check_writable("state", state);
  for (const auto& [name, x] : {std::pair("k", k), {"v", v}, {"w", w}, {"u", u}})
    check_apart("state", state, name, x);
  in.cut_and_run(context, kernels(in.dtype).wkv4_forward);
}

void backward4(const rwkv6_context* context, const DLTensor* grad_y,
               const DLTensor* grad_final_state, const DLTensor* k, const DLTensor* v,
               const DLTensor* w, const DLTensor* u, const DLTensor* initial_state,
               DLTensor* grad_k, DLTensor* grad_v, DLTensor* grad_w, DLTensor* grad_u,
               DLTensor* grad_initial_state) {
  Wkv4Inputs in(k, v, w, u);
  const Shape shape = in.shape;
  Wkv4Job& job = in.job;
  if (initial_state) job.initial = channel_states("initial_state", initial_state, shape, in.acc);
  if (grad_y) job.grad_y = channel_tokens("grad_y", grad_y, shape, in.dtype);
  if (grad_final_state)
    job.grad_final = channel_states("grad_final_state", grad_final_state, shape, in.acc);
  job.grad_k = channel_tokens("grad_k", grad_k, shape, in.dtype);
  job.grad_v = channel_tokens("grad_v", grad_v, shape, in.dtype);
  const Heads out_w = channel_vector("grad_w", grad_w, shape, job.w.dtype, job.w.dtype);
  const Heads out_u = channel_vector("grad_u", grad_u, shape, job.u.dtype, job.u.dtype);
  if (grad_initial_state)
    job.grad_initial = channel_states("grad_initial_state", grad_initial_state, shape, in.acc);
  for (const auto& [name, x] :
       {std::pair("grad_k", grad_k), {"grad_v", grad_v}, {"grad_w", grad_w}, {"grad_u", grad_u}})
    check_writable(name, x);
  if (grad_initial_state) check_writable("grad_initial_state", grad_initial_state);

  // What each batch row gives to w and u, summed afterwards in a fixed order.
  const int64_t bytes = shape.B * shape.N * size_of(in.acc);
  const std::unique_ptr<char[]> parts(new char[size_t(2 * bytes)]);  // [2, B, D]
  job.grad_w = parts.get(), job.grad_u = parts.get() + bytes;
  in.cut_and_run(context, kernels(in.dtype).wkv4_backward);

  std::vector<int64_t> rows(size_t(shape.B));
  std::iota(rows.begin(), rows.end(), 0);
  const int64_t first[2] = {0, shape.B};
  SumJob sum = {};
  sum.S = sum.H = sum.rows = 1, sum.N = shape.N;
  sum.first = first, sum.members = rows.data();
  for (const auto& [from, to] : {std::pair(job.grad_w, out_w), {job.grad_u, out_u}}) {
    sum.parts = from;
    sum.out = {to.data, to.dtype, 0, 0, shape.N};
    run(Threads(nullptr, 0), sum, kernels(in.dtype).sum);
  }
}

}  // namespace
}  // namespace rwkv6

const char* rwkv6_wkv4_forward(const rwkv6_context* context, const DLTensor* k, const DLTensor* v,
                               const DLTensor* w, const DLTensor* u, const DLTensor* initial_state,
                               DLTensor* y, DLTensor* final_state) {
  return rwkv6::message_of(
      [&] { rwkv6::forward4(context, k, v, w, u, initial_state, y, final_state); });
}

const char* rwkv6_wkv4_backward(const rwkv6_context* context, const DLTensor* grad_y,
                                const DLTensor* grad_final_state, const DLTensor* k,
                                const DLTensor* v, const DLTensor* w, const DLTensor* u,
                                const DLTensor* initial_state, DLTensor* grad_k, DLTensor* grad_v,
                                DLTensor* grad_w, DLTensor* grad_u, DLTensor* grad_initial_state) {
  return rwkv6::message_of([&] {
    rwkv6::backward4(context, grad_y, grad_final_state, k, v, w, u, initial_state, grad_k, grad_v,
                     grad_w, grad_u, grad_initial_state);
  });
}

const char* rwkv6_wkv4_update(const rwkv6_context* context, const DLTensor* k, const DLTensor* v,
                              const DLTensor* w, const DLTensor* u, DLTensor* state, DLTensor* y) {
  return rwkv6::message_of([&] { rwkv6::update4(context, k, v, w, u, state, y); });
}
