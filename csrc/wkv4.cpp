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
struct Wkv4Arguments {
  Sizes sizes;
  DType dtype, acc;
  Wkv4Job job = {};

  explicit Wkv4Arguments(const rwkv6_wkv4_inputs& from)
      : sizes(check_channels("k", from.k)), dtype(dtype_of("k", from.k)), acc(state_dtype(dtype)) {
    job.B = sizes.B, job.T = sizes.T, job.D = sizes.N;
    job.k = like_k("k", from.k);
    job.v = like_k("v", from.v);
    job.w = channel_vector("w", from.w, sizes, dtype, DType::f32);
    job.u = channel_vector("u", from.u, sizes, dtype, DType::f32);
    if (from.initial_state) job.initial = state("initial_state", from.initial_state);
  }

  Tokens like_k(const char* name, const DLTensor* x) const {
    return channel_tokens(name, x, sizes, dtype);
  }
  States state(const char* name, const DLTensor* x) const {
    return channel_states(name, x, sizes, acc);
  }

  void cut_and_run(const rwkv6_context* context, void (*kernel)(const Wkv4Job&, int64_t, int64_t)) {
    if (!sizes.B || !sizes.N) return;
    const Threads threads(context, sizes.B * (sizes.T + 1) * sizes.N * kWorkOfStep);
    job.parts = threads.parts(sizes.B, sizes.N, kernels(dtype).columns, 0);
    threads.run(job, kernel);
  }
};

}  // namespace
}  // namespace rwkv6

using namespace rwkv6;

const char* rwkv6_wkv4_forward(const rwkv6_context* context, const rwkv6_wkv4_inputs* inputs,
                               DLTensor* y, DLTensor* final_state) {
  return message_of([&] {
    Wkv4Arguments in(required("inputs", inputs));
    in.job.y = in.like_k("y", y);
    in.job.final = in.state("final_state", final_state);
    check_writable("y", y);
    check_writable("final_state", final_state);
    in.cut_and_run(context, kernels(in.dtype).wkv4_forward);
  });
}

const char* rwkv6_wkv4_update(const rwkv6_context* context, const rwkv6_wkv4_inputs* inputs,
                              DLTensor* state, DLTensor* y) {
  return message_of([&] {
    const rwkv6_wkv4_inputs& from = required("inputs", inputs);
    if (from.initial_state)
      throw ArgumentError("initial_state: expected NULL, an update starts from state");
    Wkv4Arguments in(from);
    in.job.initial = in.job.final = in.state("state", state);
    in.job.y = in.like_k("y", y);
    check_writable("y", y);
    check_writable("state", state);
    const std::pair<const char*, const DLTensor*> others[] = {
        {"k", from.k}, {"v", from.v}, {"w", from.w}, {"u", from.u}};
    for (const auto& [name, x] : others) check_apart("state", state, name, x);
    in.cut_and_run(context, kernels(in.dtype).wkv4_forward);
  });
}

const char* rwkv6_wkv4_backward(const rwkv6_context* context, const rwkv6_wkv4_inputs* inputs,
                                const DLTensor* grad_y, const DLTensor* grad_final_state,
                                const rwkv6_wkv4_gradients* gradients) {
  return message_of([&] {
    Wkv4Arguments in(required("inputs", inputs));
    const rwkv6_wkv4_gradients& to = required("gradients", gradients);
    const Sizes& sizes = in.sizes;
    Wkv4Job& job = in.job;
    if (grad_y) job.grad_y = in.like_k("grad_y", grad_y);
    if (grad_final_state) job.grad_final = in.state("grad_final_state", grad_final_state);
    job.grad_k = in.like_k("grad_k", to.grad_k);
    job.grad_v = in.like_k("grad_v", to.grad_v);
    const Heads grad_w = channel_vector("grad_w", to.grad_w, sizes, job.w.dtype, job.w.dtype);
    const Heads grad_u = channel_vector("grad_u", to.grad_u, sizes, job.u.dtype, job.u.dtype);
    if (to.grad_initial_state)
      job.grad_initial = in.state("grad_initial_state", to.grad_initial_state);
    const std::pair<const char*, const DLTensor*> written[] = {
        {"grad_k", to.grad_k},
        {"grad_v", to.grad_v},
        {"grad_w", to.grad_w},
        {"grad_u", to.grad_u},
        {"grad_initial_state", to.grad_initial_state}};
    for (const auto& [name, x] : written)
      if (x) check_writable(name, x);

    // The terms that each batch row adds to the gradients of w and u, summed in a fixed order.
    const int64_t bytes = sizes.B * sizes.N * size_of(in.acc);
    const std::unique_ptr<char[]> terms(new char[size_t(2 * bytes)]);  // [2, B, D]
    job.grad_w_terms = terms.get(), job.grad_u_terms = terms.get() + bytes;
    in.cut_and_run(context, kernels(in.dtype).wkv4_backward);

    std::vector<int64_t> rows(size_t(sizes.B));
    std::iota(rows.begin(), rows.end(), 0);
    const int64_t first[2] = {0, sizes.B};
    SumJob sum = {};
    sum.S = sum.H = sum.rows = 1, sum.N = sizes.N;
    sum.first = first, sum.members = rows.data();
    for (const auto& [from, out] :
         {std::pair(job.grad_w_terms, grad_w), {job.grad_u_terms, grad_u}}) {
      sum.terms = from;
      sum.out = {out.data, out.dtype, 0, 0, sizes.N};
      Threads(nullptr, 0).run(sum, kernels(in.dtype).sum);
    }
  });
}
