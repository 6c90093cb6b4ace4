// The entry points of WKV6: check the arguments; on the CPU choose the kernels, cut the work and
// run it; on a GPU hand it to cuda/dispatch.h.
#include <memory>
#include <utility>

#include "cuda/dispatch.h"
#include "run.h"

namespace rwkv6 {
namespace {

// The backward of fewer heads than this, over all sequences, is cut in two.
constexpr int64_t kFewHeads = 4;
// The share of the forward's time that does not shrink with the number of columns: decays and the
// products of pairs within a chunk.
constexpr double kIntraChunkShare = 0.27;

// About how many multiply-adds a call takes.
int64_t work_of(const Sizes& sizes) {
  return (sizes.B * sizes.T + 1) * sizes.H * sizes.N * sizes.N;
}

// What every entry point is given, checked.
struct Arguments {
  Sizes sizes;
  DType dtype, acc;  // of the inputs; of the accumulator and the states
  WkvInputs inputs = {};

  // The sequences start from `state`: initial_state, or in place the state that is updated. Without
  // y there are no r and u, on which only y depends.
  Arguments(const rwkv6_wkv_inputs& from, const DLTensor* state, bool in_place, bool has_y = true)
      : sizes(has_y ? check_first("r", from.r) : check_first("k", from.k)),
        dtype(has_y ? dtype_of("r", from.r) : dtype_of("k", from.k)),
        acc(state_dtype(dtype)) {
    inputs.H = sizes.H, inputs.N = sizes.N;
    if (has_y) inputs.r = like_r("r", from.r);
    inputs.k = like_r("k", from.k);
    inputs.v = like_r("v", from.v);
    inputs.w = tokens("w", from.w, sizes, dtype, DType::f32);
    if (has_y) inputs.u = heads("u", from.u, sizes, dtype, DType::f32);
    if (in_place)
      inputs.initial = states("state", state, -1, sizes, acc, acc);
    else if (state)
      inputs.initial = states("initial_state", state, -1, sizes, acc, dtype);
    inputs.sequences = check_sequences(sizes, from.state_map, from.cu_seqlens, state, in_place);
  }

  // A [B, T, H, N] tensor of the inputs' dtype.
  Tokens like_r(const char* name, const DLTensor* x) const {
    return tokens(name, x, sizes, dtype, dtype);
  }

  // The [B P, H, N, N] checkpoints, if they are there.
  States checkpoints(const DLTensor* x) const {
    if (!x) return {};
    const States result = states("checkpoints", x, -1, sizes, acc, acc);
    const int64_t rows = inputs.sequences.checkpoints();
    if (x->shape[0] < rows)
      throw ArgumentError("checkpoints: expected at least " + std::to_string(rows) + " rows, got " +
                          std::to_string(x->shape[0]));
    return result;
  }

  // A [B or M, H, N, N] tensor of the accumulator's dtype.
  States final_states(const char* name, const DLTensor* x) const {
    return states(name, x, inputs.sequences.count, sizes, acc, acc);
  }
};

void run_forward(const rwkv6_context* context, const Sizes& sizes, const ForwardJob& job) {
  if (sizes.device.cuda) return cuda::forward(context, sizes.device.index, job);
  const std::vector<Sequence> list = read_sequences(job.sequences);
  const KernelsOf& cpu = kernels(job.k.dtype);
  const Threads threads(context, work_of(sizes));
  const int64_t heads = job.sequences.count * job.H;
  const int64_t parts = threads.parts(heads, job.N, cpu.columns, kIntraChunkShare);
  threads.run(ForwardWork{job, list.data(), parts}, cpu.forward);
}

// 0 to n - 1 sorted into groups, in their own order within each: those of group s are
// members[first[s]] to members[first[s + 1] - 1].
struct Groups {
  std::vector<int64_t> first, members;

  template <class F>
  Groups(int64_t n, int64_t groups, const F& group_of)
      : first(size_t(groups) + 1, 0), members(size_t(groups ? n : 0)) {
    if (!groups) return;
    for (int64_t m = 0; m < n; m++) first[size_t(group_of(m)) + 1]++;
    for (size_t s = 1; s < first.size(); s++) first[s] += first[s - 1];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t m = 0; m < n; m++) members[size_t(next[size_t(group_of(m))]++)] = m;
  }
};

void run_backward(const rwkv6_context* context, const Sizes& sizes, const BackwardJob& job) {
  if (sizes.device.cuda) return cuda::backward(context, sizes.device.index, job);
  const int64_t B = sizes.B, T = sizes.T, H = sizes.H, N = sizes.N;
  const DType acc = state_dtype(job.r.dtype);
  const std::vector<Sequence> list = read_sequences(job.sequences);
  const int64_t n = job.sequences.count;
  const KernelsOf& cpu = kernels(job.r.dtype);
  const Threads threads(context, work_of(sizes));
  const auto workspace = [&](int64_t elements) {
    return std::unique_ptr<char[]>(new char[size_t(elements * size_of(acc))]);
  };

  // With few heads the value columns are cut in two, whatever the number of threads: the terms of
  // the two add up to the same bits everywhere.
  const int64_t parts = n * H < kFewHeads && N > cpu.columns ? 2 : 1;
  BackwardWork work = {job, list.data(), parts, 0, nullptr};

  // All memory first: nothing is written yet if there is too little of it. What several sequences
  // or parts contribute to is written apart and summed afterwards, in a fixed order.
  const int64_t token_size = H * N, state_size = N * N;
  const bool shared_u = job.grad_u.stride_b == 0;
  const Groups by_u(n * parts, shared_u ? 1 : B,
                    [&](int64_t m) { return shared_u ? 0 : list[size_t(m / parts)].b; });
  const Groups by_state(n, job.sequences.states,
                        [&](int64_t m) { return list[size_t(m)].initial; });
  const Groups by_token(parts == 1 ? 0 : parts * T, T, [&](int64_t m) { return m % T; });
  const std::unique_ptr<char[]> grad_u_terms = workspace(n * parts * token_size);
  work.grad_u_terms = grad_u_terms.get();

  bool one_to_one = job.sequences.states == n && job.grad_initial.dtype == acc;
  for (int64_t m = 0; m < n; m++) one_to_one = one_to_one && list[size_t(m)].initial == m;
  std::unique_ptr<char[]> grad_initial_terms;  // [n, H, N, N]
  if (job.grad_initial.data && !one_to_one) {
    grad_initial_terms = workspace(n * H * state_size);
    work.grad_initial = {grad_initial_terms.get(), acc, H * state_size, state_size, N};
  }
  std::unique_ptr<char[]> token_terms[3];  // [B, parts, T, H, N]
  if (parts > 1) {
    work.part_stride = T * token_size;
    Tokens* const cut[] = {&work.grad_r, &work.grad_k, &work.grad_w};
    for (int x = 0; x < 3; x++) {
      token_terms[x] = workspace(B * parts * work.part_stride);
      *cut[x] = {token_terms[x].get(), acc, parts * work.part_stride, token_size, N};
    }
  }
  threads.run(work, cpu.backward);

  SumJob sum = {};
  sum.H = H, sum.N = N;
  const auto add = [&](const Groups& groups, int64_t rows, const void* terms, const States& out) {
    sum.S = int64_t(groups.first.size()) - 1;
    sum.first = groups.first.data(), sum.members = groups.members.data();
    sum.rows = rows, sum.terms = terms, sum.out = out;
    threads.run(sum, cpu.sum);
  };
  const Heads& u = job.grad_u;
  add(by_u, 1, work.grad_u_terms, {u.data, u.dtype, u.stride_b, u.stride_h, 0});
  const Tokens whole[] = {job.grad_r, job.grad_k, job.grad_w};
  for (int x = 0; x < 3 && parts > 1; x++)
    for (int64_t b = 0; b < B; b++)
      add(by_token, 1, token_terms[x].get() + b * parts * work.part_stride * size_of(acc),
          {whole[x].row(b, 0, 0), whole[x].dtype, whole[x].stride_t, whole[x].stride_h, 0});
  if (grad_initial_terms) add(by_state, N, grad_initial_terms.get(), job.grad_initial);
}

}  // namespace
}  // namespace rwkv6

using namespace rwkv6;

const char* rwkv6_wkv_forward(const rwkv6_context* context, const rwkv6_wkv_inputs* inputs,
                              DLTensor* y, DLTensor* final_state, DLTensor* checkpoints) {
  return message_of([&] {
    const rwkv6_wkv_inputs& from = required("inputs", inputs);
    const std::pair<const char*, const DLTensor*> for_y[] = {
        {"r", from.r}, {"u", from.u}, {"checkpoints", checkpoints}};
    for (const auto& [name, x] : for_y)
      if (x && !y) throw ArgumentError(std::string(name) + ": expected NULL without y");
    const Arguments in(from, from.initial_state, false, y);
    const ForwardJob job = {in.inputs, y ? in.like_r("y", y) : Tokens(),
                            in.final_states("final_state", final_state),
                            in.checkpoints(checkpoints)};
    if (y) check_writable("y", y);
    check_writable("final_state", final_state);
    if (checkpoints) check_writable("checkpoints", checkpoints);
    run_forward(context, in.sizes, job);
  });
}

const char* rwkv6_wkv_update(const rwkv6_context* context, const rwkv6_wkv_inputs* inputs,
                             DLTensor* state, DLTensor* y) {
  return message_of([&] {
    const rwkv6_wkv_inputs& from = required("inputs", inputs);
    if (from.initial_state)
      throw ArgumentError("initial_state: expected NULL, an update starts from state");
    const Arguments in(from, state, true);
    const ForwardJob job = {in.inputs, in.like_r("y", y), in.inputs.initial, {}};
    check_writable("y", y);
    check_writable("state", state);
    const std::pair<const char*, const DLTensor*> others[] = {
        {"r", from.r}, {"k", from.k}, {"v", from.v}, {"w", from.w}, {"u", from.u}, {"y", y}};
    for (const auto& [name, x] : others) check_apart("state", state, name, x);
    run_forward(context, in.sizes, job);
  });
}

const char* rwkv6_wkv_backward(const rwkv6_context* context, const rwkv6_wkv_inputs* inputs,
                               const DLTensor* checkpoints, const DLTensor* grad_y,
                               const DLTensor* grad_final_state,
                               const rwkv6_wkv_gradients* gradients) {
  return message_of([&] {
    const rwkv6_wkv_inputs& from = required("inputs", inputs);
    const rwkv6_wkv_gradients& to = required("gradients", gradients);
    const Arguments in(from, from.initial_state, false);
    if (!from.initial_state && to.grad_initial_state)
      throw ArgumentError("grad_initial_state: given without initial_state");
    const DType w = in.inputs.w.dtype, u = in.inputs.u.dtype, initial = in.inputs.initial.dtype;
    const BackwardJob job = {
        in.inputs,
        in.checkpoints(checkpoints),
        grad_y ? in.like_r("grad_y", grad_y) : Tokens(),
        grad_final_state ? in.final_states("grad_final_state", grad_final_state) : States(),
        in.like_r("grad_r", to.grad_r),
        in.like_r("grad_k", to.grad_k),
        in.like_r("grad_v", to.grad_v),
        tokens("grad_w", to.grad_w, in.sizes, w, w),
        heads("grad_u", to.grad_u, in.sizes, u, u),
        from.initial_state ? states("grad_initial_state", to.grad_initial_state,
                                    in.inputs.sequences.states, in.sizes, initial, initial)
                           : States()};
    const std::pair<const char*, const DLTensor*> written[] = {
        {"grad_r", to.grad_r}, {"grad_k", to.grad_k},
        {"grad_v", to.grad_v}, {"grad_w", to.grad_w},
        {"grad_u", to.grad_u}, {"grad_initial_state", to.grad_initial_state}};
    for (const auto& [name, x] : written)
      if (x) check_writable(name, x);
    run_backward(context, in.sizes, job);
  });
}

const char* rwkv6_cuda_architectures(void) { return cuda::architectures(); }

const char* rwkv6_cuda_problem(void) {
  try {
    return cuda::problem();
  } catch (const std::exception&) {
    return "CUDA does not tell its versions";
  }
}

int rwkv6_cuda_current_device(void) { return cuda::current_device(); }

const char* rwkv6_cpu_isa(void) {
  const Kernels* kernels = select_kernels();
  return kernels ? kernels->name : nullptr;
}
