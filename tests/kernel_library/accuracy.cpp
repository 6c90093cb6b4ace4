// Forward, backward and in-place against the oracle: every dtype, many sizes, every option.
#include <optional>
#include <utility>

#include "check.h"
#include "inputs.h"

namespace {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return "f64";
    case DType::f32: return "f32";
    case DType::bf16: return "bf16";
    default: return "f16";
  }
}

// Largest relative errors in root mean square. Rounding the exact answer costs 1.66e-3 in bfloat16
// and 2.1e-4 in float16.
double limit_of(DType dtype, bool gradient) {
  switch (dtype) {
    case DType::f64: return 1e-13;
    case DType::f32: return gradient ? 5e-6 : 1e-6;
    case DType::bf16: return 2.5e-3;
    default: return 3.2e-4;
  }
}

DLTensor* dl(std::optional<Tensor>& x) { return x ? x->dl() : nullptr; }

std::string where_of(const Form& form, int64_t N, int64_t T) {
  return "N " + std::to_string(N) + ", T " + std::to_string(T) + ", " + form.name;
}

struct Checker {
  Report& report;
  const Form& form;
  Inputs& in;
  std::string where, entry;
  std::optional<Tensor> checkpoints = {};  // which the forward kept

  bool ran(const char* message) {
    report.check(!message, entry + ", " + where + ": " + (message ? message : ""));
    return !message;
  }
  void close(const Tensor& found, const std::vector<double>& expected, const char* name) {
    const bool gradient = entry == "backward";
    const std::string kind = std::string(name_of(in.dtype)) + " " + entry + " " + name;
    report.close(found.values(), expected, limit_of(found.dtype(), gradient), kind, where);
    report.check(found.stray_bytes() == 0, kind + ", " + where + ": wrote beside the tensor");
  }

  void forward() {
    entry = "forward";
    Tensor y(in.dtype, in.tokens(), in.layout);
    Tensor final_state(in.acc, in.states(in.sequences()), in.layout);
    const int64_t of_row = in.T / RWKV6_CHECKPOINT_TOKENS;
    if (of_row) checkpoints.emplace(in.acc, in.states(in.B * of_row), in.layout);
    const rwkv6_wkv_inputs inputs = in.dl();
    if (!ran(rwkv6_wkv_forward(nullptr, &inputs, y.dl(), final_state.dl(), dl(checkpoints))))
      return;
    const Outputs expected = wkv(in.exact);
    close(y, expected.y, "y");
    close(final_state, expected.final_state, "final_state");
    if (checkpoints)
      report.check(checkpoints->stray_bytes() == 0, where + ": wrote beside the checkpoints");
  }

  void backward() {
    entry = "backward";
    std::optional<Tensor> grad_y, grad_final;
    if (form.grad_y) grad_y = in.normal(in.dtype, in.tokens());
    if (form.grad_final) grad_final = in.normal(in.acc, in.states(in.sequences()));
    const auto values = [](const std::optional<Tensor>& x) {
      return x ? x->values() : std::vector<double>();
    };
    const Gradients expected = wkv_backward(in.exact, values(grad_y), values(grad_final));
    backward(nullptr, grad_y, grad_final, expected);
    if (checkpoints) backward(checkpoints->dl(), grad_y, grad_final, expected);
  }

  void backward(const DLTensor* given, std::optional<Tensor>& grad_y,
                std::optional<Tensor>& grad_final, const Gradients& expected) {
    Tensor r(in.dtype, in.tokens(), in.layout), k(in.dtype, in.tokens(), in.layout),
        v(in.dtype, in.tokens(), in.layout), w(in.w.dtype(), in.tokens(), in.layout),
        u(in.u.dtype(), in.shape_of_u(form), in.layout);
    const int64_t state_size = in.H * in.N * in.N;
    std::optional<Tensor> initial;
    if (in.initial)
      initial.emplace(in.initial->dtype(), in.states(in.initial->elements() / state_size),
                      in.layout);
    const rwkv6_wkv_inputs inputs = in.dl();
    const rwkv6_wkv_gradients gradients = {r.dl(), k.dl(), v.dl(), w.dl(), u.dl(), dl(initial)};
    if (!ran(rwkv6_wkv_backward(nullptr, &inputs, given, dl(grad_y), dl(grad_final), &gradients)))
      return;
    close(r, expected.r, "grad_r");
    close(k, expected.k, "grad_k");
    close(v, expected.v, "grad_v");
    close(w, expected.w, "grad_w");
    close(u, expected.u, "grad_u");
    if (initial) close(*initial, expected.initial_state, "grad_initial_state");
  }

  // Rows 3 and 1 of a pool of five, and a padding row between them.
  void update() {
    entry = "update";
    const size_t M = in.exact.spans.size();
    std::vector<double> places = {3, -1, 1};
    places.resize(M);
    Tensor map(form.index, {int64_t(M)}, Layout::compact, places);
    Tensor state = in.normal(in.acc, in.states(5));
    Tensor y(in.dtype, in.tokens(), in.layout);
    Problem exact = in.exact;
    exact.initial_state = state.values();
    for (size_t m = 0; m < M; m++) exact.spans[m].initial = int64_t(places[m]);
    rwkv6_wkv_inputs inputs = in.dl();
    inputs.initial_state = nullptr, inputs.state_map = map.dl();
    if (!ran(rwkv6_wkv_update(nullptr, &inputs, state.dl(), y.dl()))) return;
    Outputs expected = wkv(exact);
    std::vector<double> pool = exact.initial_state;
    const size_t row = size_t(in.H * in.N * in.N), token_row = size_t(in.H * in.N);
    for (size_t m = 0; m < M; m++) {
      const Span& span = exact.spans[m];
      const auto tokens = expected.y.begin() + int64_t(exact.token(span, 0, 0));
      if (places[m] < 0)
        std::fill_n(tokens, size_t(span.length) * token_row, 0.0);
      else
        std::copy_n(expected.final_state.begin() + int64_t(m * row), row,
                    pool.begin() + int64_t(size_t(places[m]) * row));
    }
    close(y, expected.y, "y");
    close(state, pool, "state");
    const std::vector<double> found = state.values();
    for (size_t unused : {0, 2, 4})
      report.check(std::equal(found.begin() + int64_t(unused * row),
                              found.begin() + int64_t((unused + 1) * row),
                              exact.initial_state.begin() + int64_t(unused * row)),
                   "update, " + where + ": changed a row that no sequence names");
  }
};

// A state whose decays lie near 1 lives for thousands of tokens, in which no rounding may add up:
// w = -9, and w uniform in -9 to -5.
void slow_decays(Report& report) {
  const Form form = {.name = "slow decays", .batch = 1, .states = StateUse::each};
  for (DType dtype : {DType::f32, DType::bf16})
    for (double spread : {0., 4.}) {
      const int64_t N = 16, T = 4096;
      Inputs in(form, dtype, N, T);
      std::vector<double> w(size_t(in.w.elements()));
      for (double& value : w) value = -9 + spread * in.random.percent() / 100;
      in.w.fill(w);
      in.exact.w = in.w.values();
      Checker checker{report, form, in, where_of(form, N, T), ""};
      checker.forward();
      checker.backward();
      checker.update();
    }
}

// One element at a time of one tensor at a time is no number: the same elements of every result are
// none as in the oracle. Gradients come from both outputs, from y alone and from the state alone.
void non_finite_values(Report& report) {
  const Form form = {.name = "non-finite", .batch = 2, .states = StateUse::each, .extreme = false};
  size_t turn = 0;
  for (DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16})
    for (int64_t N : {5, 32, 64, 100})
      for (int64_t T : {1, 2, 4, 18, 67}) {
        if ((T == 67 || N == 100) && dtype != DType::f32) continue;
        Inputs in(form, dtype, N, T);
        in.H = 1;  // the oracle's time
        Tensor grad_y = in.normal(dtype, in.tokens());
        Tensor grad_final = in.normal(in.acc, in.states(in.sequences()));
        for (Tensor* x : {&in.r, &in.k, &in.v, &in.w}) *x = in.normal(dtype, in.tokens(), -1);
        in.u = in.normal(dtype, {in.H, N});
        in.initial = in.normal(in.acc, in.states(2));
        in.exact = {in.B,
                    T,
                    in.H,
                    N,
                    in.r.values(),
                    in.k.values(),
                    in.v.values(),
                    in.w.values(),
                    in.u.values(),
                    in.initial->values(),
                    {{0, 0, T, 0}, {1, 0, T, 1}}};
        std::vector<double> exact_y = grad_y.values(), exact_final = grad_final.values();
        const std::pair<Tensor*, std::vector<double>*> inputs[] = {
            {&in.r, &in.exact.r}, {&in.k, &in.exact.k},
            {&in.v, &in.exact.v}, {&in.w, &in.exact.w},
            {&in.u, &in.exact.u}, {&*in.initial, &in.exact.initial_state},
            {&grad_y, &exact_y},  {&grad_final, &exact_final}};
        for (size_t input = 0; input < std::size(inputs); input++)
          for (double value : {double(NAN), double(INFINITY), -double(INFINITY)}) {
            const auto& [tensor, exact] = inputs[input];
            const size_t place = in.random.below(exact->size());
            const double before = std::exchange((*exact)[place], value);
            tensor->fill(*exact);
            const size_t sources = turn++ % 3;
            const bool from_y = sources != 1, from_state = sources != 2;
            Tensor y(dtype, in.tokens()), final_state(in.acc, in.states(2));
            Tensor r = y, k = y, v = y, w = y, u(dtype, {in.H, N}), initial = final_state;
            const rwkv6_wkv_inputs call = in.dl();
            const rwkv6_wkv_gradients gradients = {r.dl(), k.dl(), v.dl(),
                                                   w.dl(), u.dl(), initial.dl()};
            report.check(!rwkv6_wkv_forward(nullptr, &call, y.dl(), final_state.dl(), nullptr),
                         "forward of a non-finite value");
            report.check(
                !rwkv6_wkv_backward(nullptr, &call, nullptr, from_y ? grad_y.dl() : nullptr,
                                    from_state ? grad_final.dl() : nullptr, &gradients),
                "backward of a non-finite value");
            const Outputs out = wkv(in.exact);
            const std::vector<double> none;
            const Gradients g =
                wkv_backward(in.exact, from_y ? exact_y : none, from_state ? exact_final : none);
            const std::pair<const Tensor*, const std::vector<double>*> results[] = {
                {&y, &out.y}, {&final_state, &out.final_state},
                {&r, &g.r},   {&k, &g.k},
                {&v, &g.v},   {&w, &g.w},
                {&u, &g.u},   {&initial, &g.initial_state}};
            for (size_t result = 0; result < std::size(results); result++) {
              const std::vector<double> found = results[result].first->values();
              bool same = true;
              for (size_t i = 0; i < found.size(); i++)
                same &= std::isfinite(found[i]) == std::isfinite((*results[result].second)[i]);
              report.check(same, std::to_string(value) + " in input " + std::to_string(input) +
                                     ", result " + std::to_string(result) + ", sources " +
                                     std::to_string(sources) + ", " + name_of(dtype) + ", " +
                                     where_of(form, N, T));
            }
            (*exact)[place] = before;
            tensor->fill(*exact);
          }
      }
}

// The oracle's gradients are the slopes of the oracle's outputs.
void test_oracle(Report& report) {
  Inputs in(kForms[2], DType::f64, 3, 5);
  for (double& w : in.exact.w) w = std::isfinite(w) && std::fabs(w) < 6 ? w : -1;
  const std::vector<double> grad_y = in.normal(DType::f64, in.tokens()).values();
  const std::vector<double> grad_final = in.normal(DType::f64, in.states(3)).values();
  const auto loss = [&] {
    const Outputs out = wkv(in.exact);
    double sum = 0;
    for (size_t i = 0; i < grad_y.size(); i++) sum += out.y[i] * grad_y[i];
    for (size_t i = 0; i < grad_final.size(); i++) sum += out.final_state[i] * grad_final[i];
    return sum;
  };
  const Gradients g = wkv_backward(in.exact, grad_y, grad_final);
  Problem& p = in.exact;
  const std::pair<std::vector<double>*, const std::vector<double>*> both[] = {
      {&p.r, &g.r}, {&p.k, &g.k}, {&p.v, &g.v},
      {&p.w, &g.w}, {&p.u, &g.u}, {&p.initial_state, &g.initial_state}};
  for (const auto& [x, gradient] : both) {
    std::vector<double> slopes;
    for (double& value : *x) {
      const double before = value, step = 1e-4;
      value = before + step;
      const double above = loss();
      value = before - step;
      const double below = loss();
      value = before;
      slopes.push_back((above - below) / (2 * step));
    }
    report.close(*gradient, slopes, 1e-6, "oracle", "against finite differences");
  }
}

}  // namespace

// Each size meets some of the forms in turn, each dtype and head size all of them.
void test_accuracy(Report& report) {
  test_oracle(report);
  slow_decays(report);
  report.passed_by("slow decays");
  non_finite_values(report);
  report.passed_by("non-finite values");
  const size_t forms = std::size(kForms);
  size_t turn = 0;
  for (DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    for (int64_t N : {1, 8, 17, 32, 64, 80, 128, 256})
      for (int64_t T : {0, 1, 3, 4, 5, 16, 17, 63, 65}) {
        if (N == 256 && T > 17 && dtype != DType::f32) continue;  // half of all the time
        for (size_t some = N <= 64 ? 2 : 1; some > 0; some--) {
          const Form& form = kForms[turn++ % forms];
          Inputs in(form, dtype, N, T);
          Checker checker{report, form, in, where_of(form, N, T), ""};
          checker.forward();
          checker.backward();
          checker.update();
        }
      }
    report.passed_by(name_of(dtype));
  }
}
