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
// Of the forward's time, what does not become less with the columns: decays, pairs of a chunk.
constexpr double kWeighing = 0.27;

int64_t work_of(Shape shape) { return (shape.B * shape.T + 1) * shape.H * shape.N * shape.N; }

// What every entry point is given, checked.
struct Inputs {
  Shape shape;
  DType dtype, acc;  // of the inputs, of the accumulator and the states
  Tokens r, k, v, w;
  Heads u;

  Inputs(const DLTensor* r, const DLTensor* k, const DLTensor* v, const DLTensor* w,
         const DLTensor* u)
      : shape(check_r(r)),
        dtype(dtype_of("r", r)),
        acc(state_dtype(dtype)),
        r(tokens("r", r, shape, dtype, dtype)),
        k(tokens("k", k, shape, dtype, dtype)),
        v(tokens("v", v, shape, dtype, dtype)),
        w(tokens("w", w, shape, dtype, DType::f32)),
        u(heads("u", u, shape, dtype, DType::f32)) {}

  // Absent for NULL.
  States initial_state(const DLTensor* x) const {
    return x ? states("initial_state", x, -1, shape, acc, dtype) : States();
  }

  // A [B, T, H, N] tensor of the inputs' dtype.
  Tokens like_r(const char* name, const DLTensor* x) const {
    return tokens(name, x, shape, dtype, dtype);
  }

  template <class Job>  // a ForwardJob or a BackwardJob, of the CPU or of a GPU
  Job job() const {
    Job job = {};
    job.H = shape.H, job.N = shape.N;
    job.r = r, job.k = k, job.v = v, job.w = w, job.u = u;
    return job;
  }
};

cuda::Sequences on_gpu(const Walk& walk) {
  return {walk.count,
          walk.shape.T,
          walk.states,
          indices(walk.state_map),
          indices(walk.cu_seqlens),
          walk.use == StateUse::update,
          nullptr};
}

// From the initial states to the final ones.
void run_forward(const rwkv6_context* context, const Inputs& in, const Walk& walk, const Tokens& y,
                 const States& initial, const States& final) {
  const auto fill = [&](auto job) {
    job.y = y;
    job.initial = initial;
    job.final = final;
    return job;
  };
  if (in.shape.device.cuda) {
    auto job = fill(in.job<cuda::ForwardJob>());
    job.sequences = on_gpu(walk);
    return cuda::forward(context, in.shape.device.index, job);
  }
  const std::vector<Sequence> sequences = walk.sequences();
  auto job = fill(in.job<ForwardJob>());
  job.sequences = sequences.data(), job.num_sequences = walk.count;
  const KernelsOf& cpu = kernels(in.dtype);
  const Threads threads(context, work_of(in.shape));
  job.parts = threads.parts(job.num_sequences * job.H, job.N, cpu.columns, kWeighing);
  run(threads, job, cpu.forward);
}

void forward(const rwkv6_context* context, const DLTensor* r, const DLTensor* k, const DLTensor* v,
             const DLTensor* w, const DLTensor* u, const DLTensor* initial_state,
             const DLTensor* state_map, const DLTensor* cu_seqlens, DLTensor* y,
             DLTensor* final_state) {
  const Inputs in(r, k, v, w, u);
  const States initial = in.initial_state(initial_state);
  const Walk walk(in.shape, state_map, cu_seqlens, initial_state ? StateUse::read : StateUse::none,
                  initial_state);
  const Tokens y_rows = in.like_r("y", y);
  const States final = states("final_state", final_state, walk.count, in.shape, in.acc, in.acc);
  check_writable("y", y);
  check_writable("final_state", final_state);
  run_forward(context, in, walk, y_rows, initial, final);
}

void update(const rwkv6_context* context, const DLTensor* r, const DLTensor* k, const DLTensor* v,
            const DLTensor* w, const DLTensor* u, DLTensor* state, const DLTensor* state_map,
            const DLTensor* cu_seqlens, DLTensor* y) {
  const Inputs in(r, k, v, w, u);
  const States rows = states("state", state, -1, in.shape, in.acc, in.acc);
  const Walk walk(in.shape, state_map, cu_seqlens, StateUse::update, state);
  const Tokens y_rows = in.like_r("y", y);
  check_writable("y", y);
  check_writable("state", state);
  const std::pair<const char*, const DLTensor*> others[] = {{"r", r}, {"k", k}, {"v", v},
                                                            {"w", w}, {"u", u}, {"y", y}};
  for (const auto& [name, x] : others) check_apart("state", state, name, x);
  run_forward(context, in, walk, y_rows, rows, rows);
}

// 0 to n - 1 sorted into groups, in their own order within each: those of group s are
// members[first[s]] to members[first[s + 1]].
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

// The gradients on the CPU; `job` lacks its sequences and their memory.
void backward_on_cpu(const rwkv6_context* context, const Inputs& in, const Walk& walk,
                     BackwardJob job, const Heads& grad_u, const States& grad_initial) {
  const Shape shape = in.shape;
  const DType acc = in.acc;
  const std::vector<Sequence> list = walk.sequences();
  const int64_t n = walk.count, rows = walk.states;
  job.sequences = list.data(), job.num_sequences = n;
  const KernelsOf& cpu = kernels(in.dtype);
  const Threads threads(context, work_of(shape));
  const int64_t state_size = shape.N * shape.N;
  const auto workspace = [&](int64_t elements) {
    return std::unique_ptr<char[]>(new char[size_t(elements * size_of(acc))]);
  };

  // With few heads the value columns are cut in two, whatever the number of threads: the terms of
  // the two add up to the same bits everywhere.
  job.parts = n * shape.H < kFewHeads && shape.N > cpu.columns ? 2 : 1;
  // All memory first: nothing is written yet if there is too little of it.
  const int64_t members = n * job.parts, token_size = shape.H * shape.N;
  const Groups every(members, 1, [](int64_t) { return int64_t(0); });
  const Groups by_state(n, rows, [&](int64_t m) { return list[size_t(m)].initial; });
  const Groups by_token(job.parts == 1 ? 0 : job.parts * shape.T, shape.T,
                        [&](int64_t m) { return m % shape.T; });
  const std::unique_ptr<char[]> grad_u_parts = workspace(members * token_size);
  job.grad_u = grad_u_parts.get();

  const bool wanted = walk.use == StateUse::read;
  bool one_to_one = wanted && rows == n && grad_initial.dtype == acc;
  for (int64_t m = 0; m < n; m++) one_to_one = one_to_one && list[size_t(m)].initial == m;
  std::unique_ptr<char[]> per_sequence;  // [n, H, N, N]
  if (one_to_one) {
    job.grad_initial = grad_initial;
  } else if (wanted) {
    per_sequence = workspace(n * shape.H * state_size);
    job.grad_initial = {per_sequence.get(), acc, shape.H * state_size, state_size, shape.N};
  }
  const Tokens grads[] = {job.grad_r, job.grad_k, job.grad_w};
  std::unique_ptr<char[]> terms[3];  // [B, parts, T, H, N]
  if (job.parts > 1) {
    job.part_stride = shape.T * token_size;
    Tokens* targets[] = {&job.grad_r, &job.grad_k, &job.grad_w};
    for (int x = 0; x < 3; x++) {
      terms[x] = workspace(shape.B * job.parts * job.part_stride);
      *targets[x] = {terms[x].get(), acc, job.parts * job.part_stride, token_size, shape.N};
    }
  }
  run(threads, job, cpu.backward);

  SumJob sum = {};
  sum.H = shape.H, sum.N = shape.N;
  sum.rows = 1;
  const auto add = [&](const Groups& groups, const void* parts, const States& out) {
    sum.S = int64_t(groups.first.size()) - 1;
    sum.first = groups.first.data(), sum.members = groups.members.data();
    sum.parts = parts;
    sum.out = out;
    run(threads, sum, cpu.sum);
  };
  add(every, job.grad_u, {grad_u.data, grad_u.dtype, 0, grad_u.stride_h, 0});
  for (int x = 0; x < 3 && job.parts > 1; x++)
    for (int64_t b = 0; b < shape.B; b++)
      add(by_token, terms[x].get() + b * job.parts * job.part_stride * size_of(acc),
          {grads[x].row(b, 0, 0), grads[x].dtype, grads[x].stride_t, grads[x].stride_h, 0});
  sum.rows = shape.N;
  if (per_sequence) add(by_state, per_sequence.get(), grad_initial);
}

void backward(const rwkv6_context* context, const DLTensor* grad_y,
              const DLTensor* grad_final_state, const DLTensor* r, const DLTensor* k,
              const DLTensor* v, const DLTensor* w, const DLTensor* u,
              const DLTensor* initial_state, const DLTensor* state_map, const DLTensor* cu_seqlens,
              DLTensor* grad_r, DLTensor* grad_k, DLTensor* grad_v, DLTensor* grad_w,
              DLTensor* grad_u, DLTensor* grad_initial_state) {
  const Inputs in(r, k, v, w, u);
  const States initial = in.initial_state(initial_state);
  const Walk walk(in.shape, state_map, cu_seqlens, initial_state ? StateUse::read : StateUse::none,
                  initial_state);
  const auto fill = [&](auto job) {
    job.initial = initial;
    if (grad_y) job.grad_y = in.like_r("grad_y", grad_y);
    if (grad_final_state)
      job.grad_final =
          states("grad_final_state", grad_final_state, walk.count, in.shape, in.acc, in.acc);
    job.grad_r = in.like_r("grad_r", grad_r);
    job.grad_k = in.like_r("grad_k", grad_k);
    job.grad_v = in.like_r("grad_v", grad_v);
    job.grad_w = tokens("grad_w", grad_w, in.shape, in.w.dtype, in.w.dtype);
    return job;
  };
  auto job = fill(in.job<BackwardJob>());
  const Heads grad_u_rows = heads("grad_u", grad_u, in.shape, in.u.dtype, in.u.dtype);
  States grad_initial;
  if (initial_state)
    grad_initial = states("grad_initial_state", grad_initial_state, walk.states, in.shape,
                          initial.dtype, initial.dtype);
  else if (grad_initial_state)
    throw ArgumentError("grad_initial_state: given without initial_state");
  check_writable("grad_r", grad_r);
  check_writable("grad_k", grad_k);
  check_writable("grad_v", grad_v);
  check_writable("grad_w", grad_w);
  check_writable("grad_u", grad_u);
  if (initial_state) check_writable("grad_initial_state", grad_initial_state);
  if (!in.shape.device.cuda)
    return backward_on_cpu(context, in, walk, job, grad_u_rows, grad_initial);
  auto gpu_job = fill(in.job<cuda::BackwardJob>());
  gpu_job.sequences = on_gpu(walk);
  gpu_job.grad_u = grad_u_rows;
  cuda::backward(context, in.shape.device.index, gpu_job, grad_initial);
}

}  // namespace
}  // namespace rwkv6

const char* rwkv6_wkv_forward(const rwkv6_context* context, const DLTensor* r, const DLTensor* k,
                              const DLTensor* v, const DLTensor* w, const DLTensor* u,
                              const DLTensor* initial_state, const DLTensor* state_map,
                              const DLTensor* cu_seqlens, DLTensor* y, DLTensor* final_state) {
  return rwkv6::message_of([&] {
    rwkv6::forward(context, r, k, v, w, u, initial_state, state_map, cu_seqlens, y, final_state);
  });
}

const char* rwkv6_wkv_backward(const rwkv6_context* context, const DLTensor* grad_y,
                               const DLTensor* grad_final_state, const DLTensor* r,
                               const DLTensor* k, const DLTensor* v, const DLTensor* w,
                               const DLTensor* u, const DLTensor* initial_state,
                               const DLTensor* state_map, const DLTensor* cu_seqlens,
                               DLTensor* grad_r, DLTensor* grad_k, DLTensor* grad_v,
                               DLTensor* grad_w, DLTensor* grad_u, DLTensor* grad_initial_state) {
  return rwkv6::message_of([&] {
    rwkv6::backward(context, grad_y, grad_final_state, r, k, v, w, u, initial_state, state_map,
                    cu_seqlens, grad_r, grad_k, grad_v, grad_w, grad_u, grad_initial_state);
  });
}

const char* rwkv6_wkv_update(const rwkv6_context* context, const DLTensor* r, const DLTensor* k,
                             const DLTensor* v, const DLTensor* w, const DLTensor* u,
                             DLTensor* state, const DLTensor* state_map, const DLTensor* cu_seqlens,
                             DLTensor* y) {
  return rwkv6::message_of(
      [&] { rwkv6::update(context, r, k, v, w, u, state, state_map, cu_seqlens, y); });
}

const char* rwkv6_cuda_architectures(void) { return rwkv6::cuda::architectures(); }

const char* rwkv6_cuda_problem(void) {
  try {
    return rwkv6::cuda::problem();
  } catch (const std::exception&) {
    return "CUDA does not tell its versions";
  }
}

int rwkv6_cuda_current_device(void) { return rwkv6::cuda::current_device(); }

const char* rwkv6_cpu_isa(void) {
  const rwkv6::Kernels* kernels = rwkv6::select_kernels();
  return kernels ? kernels->name : nullptr;
}
