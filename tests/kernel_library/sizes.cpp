// Every relation of the sizes of a call: which dimension is larger, odd sizes, few and many rows,
// one thread and several. What a kernel borrows for its work is sized by some of these numbers and
// indexed by others. Under AddressSanitizer a wrong size is found as such; without it, as a wrong
// value.
#include <thread>

#include "check.h"
#include "oracle.h"
#include "random.h"
#include "tensor.h"

namespace {

using Values = std::vector<double>;
using Shape = std::vector<int64_t>;

Random numbers(3);

int64_t between(int64_t low, int64_t high) {
  return low + int64_t(numbers.below(size_t(high - low + 1)));
}
template <class T>
T one_of(std::initializer_list<T> choices) {
  return choices.begin()[between(0, int64_t(choices.size()) - 1)];
}

Tensor normal(DType dtype, Shape shape, double scale = 1, double mean = 0,
              Layout layout = Layout::compact) {
  Tensor x(dtype, std::move(shape), layout);
  Values values(size_t(x.elements()));
  for (double& value : values) value = mean + scale * numbers.normal();
  x.fill(values);
  return x;
}

DType any_dtype() { return one_of({DType::f32, DType::f64, DType::bf16, DType::f16}); }
DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }
double tolerance(DType dtype) {
  switch (dtype) {
    case DType::f64: return 1e-12;
    case DType::f32: return 1e-5;
    case DType::f16: return 1e-3;
    default: return 6e-3;
  }
}

// Three threads, each with a share of the work.
const rwkv6_context kThreads = [] {
  rwkv6_context context = {};
  context.parallel_for = [](void*, int64_t n, void (*body)(void*, int64_t, int64_t), void* data) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < 3; i++)
      if (n * i / 3 < n * (i + 1) / 3) threads.emplace_back(body, data, n * i / 3, n * (i + 1) / 3);
    for (std::thread& thread : threads) thread.join();
  };
  context.num_threads = 3;
  return context;
}();

const rwkv6_context* any_context() { return one_of({&kThreads, (const rwkv6_context*)nullptr}); }

// x [M, K] times W^T, W [N, K].
Values times(const Values& x, const Values& W, size_t M, size_t N, size_t K) {
  Values y(M * N, 0);
  for (size_t m = 0; m < M; m++)
    for (size_t n = 0; n < N; n++)
      for (size_t k = 0; k < K; k++) y[m * N + n] += x[m * K + k] * W[n * K + k];
  return y;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// A weight [N, K]: of the call's dtype, or of int8 with a scale for each row.
struct Weight {
  Tensor numbers, scale;
  bool quantised;

  Weight(DType dtype, int64_t N, int64_t K, bool int8, Layout layout = Layout::compact)
      : numbers(int8 ? DType::i8 : dtype, {N, K}, layout),
        scale(normal(DType::f32, {N}, 1)),
        quantised(int8) {
    Values x(size_t(N * K));
    for (double& value : x)
      value = int8 ? double(between(-127, 127)) : deviation(K) * ::numbers.normal();
    numbers.fill(x);
    if (!int8) return;
    Values factors = scale.values();
    for (double& factor : factors) factor *= deviation(K) / 73;  // 73: of between(-127, 127)
    scale.fill(factors);
  }

  Values values() const {
    Values x = numbers.values();
    if (!quantised) return x;
    const Values factors = scale.values();
    const size_t K = factors.empty() ? 1 : x.size() / factors.size();
    for (size_t i = 0; i < x.size(); i++) x[i] *= factors[i / K];
    return x;
  }

  DLTensor* scale_dl() { return quantised ? scale.dl() : nullptr; }

 private:
  // The standard deviation with which a product of K terms stays near 1.
  static double deviation(int64_t K) { return 1 / std::sqrt(double(K)); }
};

// Groups of n values of x, each to mean 0 and variance 1, times weight plus bias of `width` values.
Values norm(const Values& x, size_t n, double eps, const Values& weight, const Values& bias) {
  Values y(x.size());
  for (size_t at = 0; at < x.size(); at += n) {
    double mean = 0, variance = 0;
    for (size_t i = 0; i < n; i++) mean += x[at + i] / double(n);
    for (size_t i = 0; i < n; i++) variance += (x[at + i] - mean) * (x[at + i] - mean) / double(n);
    for (size_t i = 0; i < n; i++) {
      const size_t channel = (at + i) % weight.size();
      y[at + i] = (x[at + i] - mean) / std::sqrt(variance + eps) * weight[channel] + bias[channel];
    }
  }
  return y;
}

// A layer of RWKV-6: parameters, inputs and one token in float64 by the equations.
class Layer {
  DType dtype_;
  size_t M_, H_, N_, D_, F_, rank_, decay_rank_;
  Tensor ln1_w_, ln1_b_, maa_x_, maa_w_, maa_k_, maa_v_, maa_r_, maa_g_, maa_w1_, maa_w2_, decay_,
      decay_w1_, decay_w2_, u_, ln_x_w_, ln_x_b_, ln2_w_, ln2_b_, ffn_maa_k_, ffn_maa_r_;
  Weight receptance_, key_, value_, gate_, output_, ffn_key_, ffn_receptance_, ffn_value_;
  Tensor x_, att_shift_, wkv_, ffn_shift_, y_;
  static constexpr double kEps = 1e-5, kHeadEps = 64e-5;

  Tensor matrix(size_t rows, size_t columns) {
    return normal(dtype_, {int64_t(rows), int64_t(columns)}, 1 / std::sqrt(double(columns)));
  }
  Tensor vector(double mean = 0) { return normal(dtype_, {int64_t(D_)}, .3, mean); }

  // token + change * share, row by row.
  Values mix(const Values& token, const Values& change, const Values& share) const {
    Values mixed(token.size());
    for (size_t i = 0; i < token.size(); i++)
      mixed[i] = token[i] + change[i] * share[share.size() == D_ ? i % D_ : i];
    return mixed;
  }

  // base + tanh(x w1) w2, with the columns [first, first + rank) of w1.
  Values low_rank(const Values& x, const Values& w1, size_t pitch, size_t first, const double* w2,
                  size_t rank, const Values& base) const {
    Values y(M_ * D_);
    for (size_t m = 0; m < M_; m++) {
      for (size_t d = 0; d < D_; d++) y[m * D_ + d] = base[d];
      for (size_t i = 0; i < rank; i++) {
        double hidden = 0;
        for (size_t d = 0; d < D_; d++) hidden += x[m * D_ + d] * w1[d * pitch + first + i];
        for (size_t d = 0; d < D_; d++) y[m * D_ + d] += std::tanh(hidden) * w2[i * D_ + d];
      }
    }
    return y;
  }

 public:
  Layer(DType dtype, bool int8, int64_t M, int64_t H, int64_t N, int64_t F, int64_t rank,
        int64_t decay_rank)
      : dtype_(dtype),
        M_(size_t(M)),
        H_(size_t(H)),
        N_(size_t(N)),
        D_(size_t(H * N)),
        F_(size_t(F)),
        rank_(size_t(rank)),
        decay_rank_(size_t(decay_rank)),
        ln1_w_(vector(1)),
        ln1_b_(vector()),
        maa_x_(vector(.5)),
        maa_w_(vector(.5)),
        maa_k_(vector(.5)),
        maa_v_(vector(.5)),
        maa_r_(vector(.5)),
        maa_g_(vector(.5)),
        maa_w1_(matrix(D_, 5 * rank_)),
        maa_w2_(normal(dtype, {5, rank, H * N}, .1)),
        decay_(vector(-2)),
        decay_w1_(matrix(D_, decay_rank_)),
        decay_w2_(matrix(decay_rank_, D_)),
        u_(normal(dtype, {H, N}, .3)),
        ln_x_w_(vector(1)),
        ln_x_b_(vector()),
        ln2_w_(vector(1)),
        ln2_b_(vector()),
        ffn_maa_k_(vector(.5)),
        ffn_maa_r_(vector(.5)),
        receptance_(dtype, H * N, H * N, int8),
        key_(dtype, H * N, H * N, int8),
        value_(dtype, H * N, H * N, int8),
        gate_(dtype, H * N, H * N, int8),
        output_(dtype, H * N, H * N, int8),
        ffn_key_(dtype, F, H * N, int8),
        ffn_receptance_(dtype, H * N, H * N, int8),
        ffn_value_(dtype, H * N, F, int8),
        x_(normal(dtype, {M, H * N})),
        att_shift_(normal(dtype, {M, H * N})),
        wkv_(normal(wide(dtype), {M, H, N, N})),
        ffn_shift_(normal(dtype, {M, H * N})),
        y_(dtype, {M, H * N}) {}

  const char* run(const rwkv6_context* context) {
    rwkv6_layer layer = {};
    layer.ln1_weight = ln1_w_.dl();
    layer.ln1_bias = ln1_b_.dl();
    layer.att_time_maa_x = maa_x_.dl();
    layer.att_time_maa_w = maa_w_.dl();
    layer.att_time_maa_k = maa_k_.dl();
    layer.att_time_maa_v = maa_v_.dl();
    layer.att_time_maa_r = maa_r_.dl();
    layer.att_time_maa_g = maa_g_.dl();
    layer.att_time_maa_w1 = maa_w1_.dl();
    layer.att_time_maa_w2 = maa_w2_.dl();
    layer.att_time_decay = decay_.dl();
    layer.att_time_decay_w1 = decay_w1_.dl();
    layer.att_time_decay_w2 = decay_w2_.dl();
    layer.att_time_faaaa = u_.dl();
    layer.att_receptance = receptance_.numbers.dl(),
    layer.att_receptance_scale = receptance_.scale_dl();
    layer.att_key = key_.numbers.dl(), layer.att_key_scale = key_.scale_dl();
    layer.att_value = value_.numbers.dl(), layer.att_value_scale = value_.scale_dl();
    layer.att_gate = gate_.numbers.dl(), layer.att_gate_scale = gate_.scale_dl();
    layer.att_output = output_.numbers.dl(), layer.att_output_scale = output_.scale_dl();
    layer.att_ln_x_weight = ln_x_w_.dl();
    layer.att_ln_x_bias = ln_x_b_.dl();
    layer.ln2_weight = ln2_w_.dl();
    layer.ln2_bias = ln2_b_.dl();
    layer.ffn_time_maa_k = ffn_maa_k_.dl();
    layer.ffn_time_maa_r = ffn_maa_r_.dl();
    layer.ffn_key = ffn_key_.numbers.dl(), layer.ffn_key_scale = ffn_key_.scale_dl();
    layer.ffn_receptance = ffn_receptance_.numbers.dl(),
    layer.ffn_receptance_scale = ffn_receptance_.scale_dl();
    layer.ffn_value = ffn_value_.numbers.dl(), layer.ffn_value_scale = ffn_value_.scale_dl();
    layer.ln_eps = kEps, layer.ln_x_eps = kHeadEps;
    return rwkv6_decode_layer(context, &layer, x_.dl(), att_shift_.dl(), wkv_.dl(), ffn_shift_.dl(),
                              y_.dl());
  }

  void compare(Report& report, const rwkv6_context* context, const std::string& where) {
    const Values x = x_.values(), att_shift = att_shift_.values(), ffn_shift = ffn_shift_.values();
    const Values state = wkv_.values();
    const char* message = run(context);
    report.check(!message, "layer, " + where + ": " + (message ? message : ""));

    const Values token = norm(x, D_, kEps, ln1_w_.values(), ln1_b_.values());
    Values change(token.size());
    for (size_t i = 0; i < token.size(); i++) change[i] = att_shift[i] - token[i];
    const Values w1 = maa_w1_.values(), w2 = maa_w2_.values();
    const Values mixed_x = mix(token, change, maa_x_.values());
    const auto mixed = [&](size_t i, const Tensor& maa) {
      const double* own_w2 = w2.data() + i * rank_ * D_;
      return mix(token, change,
                 low_rank(mixed_x, w1, 5 * rank_, i * rank_, own_w2, rank_, maa.values()));
    };
    const auto projected = [&](const Values& input, const Weight& weight) {
      return times(input, weight.values(), M_, D_, D_);
    };
    const int64_t M = int64_t(M_), H = int64_t(H_), N = int64_t(N_);
    const Values g = projected(mixed(4, maa_g_), gate_);
    Problem wkv = {M,
                   1,
                   H,
                   N,
                   projected(mixed(3, maa_r_), receptance_),
                   projected(mixed(1, maa_k_), key_),
                   projected(mixed(2, maa_v_), value_),
                   low_rank(mixed(0, maa_w_), decay_w1_.values(), decay_rank_, 0,
                            decay_w2_.values().data(), decay_rank_, decay_.values()),
                   u_.values(),
                   state,
                   {}};
    for (int64_t m = 0; m < M; m++) wkv.spans.push_back({m, 0, 1, m});
    const Outputs out = ::wkv(wkv);
    Values y = norm(out.y, N_, kHeadEps, ln_x_w_.values(), ln_x_b_.values());
    for (size_t i = 0; i < y.size(); i++) y[i] *= g[i] * sigmoid(g[i]);
    const Values att = projected(y, output_);
    Values stream(x.size());
    for (size_t i = 0; i < x.size(); i++) stream[i] = x[i] + att[i];

    const Values second = norm(stream, D_, kEps, ln2_w_.values(), ln2_b_.values());
    for (size_t i = 0; i < second.size(); i++) change[i] = ffn_shift[i] - second[i];
    Values hidden = times(mix(second, change, ffn_maa_k_.values()), ffn_key_.values(), M_, F_, D_);
    for (double& h : hidden) h = h > 0 ? h * h : 0;
    const Values ffn = times(hidden, ffn_value_.values(), M_, D_, F_);
    const Values gate = projected(mix(second, change, ffn_maa_r_.values()), ffn_receptance_);
    for (size_t i = 0; i < x.size(); i++) stream[i] += sigmoid(gate[i]) * ffn[i];

    const double limit = tolerance(dtype_);
    report.close(y_.values(), stream, limit, "layer y", where);
    report.close(wkv_.values(), out.final_state, dtype_ == DType::f64 ? 1e-12 : 1e-4, "layer state",
                 where);
    report.close(att_shift_.values(), token, limit, "layer att_shift", where);
    report.close(ffn_shift_.values(), second, limit, "layer ffn_shift", where);
    int64_t stray = 0;
    for (const Tensor* tensor : {&y_, &wkv_, &att_shift_, &ffn_shift_})
      stray += tensor->stray_bytes();
    report.check(!stray, "layer writes its outputs alone, " + where);
  }
};

void layers(Report& report, int calls) {
  for (int call = 0; call < calls; call++) {
    const int64_t H = between(1, 4), N = one_of<int64_t>({1, 2, 3, 8, 16, 17}), D = H * N;
    const auto around_D = [&] { return one_of<int64_t>({1, between(1, D), D, between(D, 5 * D)}); };
    const int64_t M = between(1, 9), F = around_D(), rank = around_D(), decay_rank = around_D();
    const std::string where = "M " + std::to_string(M) + ", H " + std::to_string(H) + ", N " +
                              std::to_string(N) + ", F " + std::to_string(F) + ", ranks " +
                              std::to_string(rank) + " and " + std::to_string(decay_rank);
    // D = 1 normalises everything to zero, and rounding is then all there is
    const DType dtype = D < 4 ? DType::f64 : any_dtype();
    const bool int8 = numbers.percent() < 40;
    Layer(dtype, int8, M, H, N, F, rank, decay_rank)
        .compare(report, any_context(), where + (int8 ? ", int8" : ""));
  }
}

void products(Report& report, int calls) {
  for (int call = 0; call < calls; call++) {
    const int64_t M = between(0, 9), N = between(0, 150), K = between(1, 150);
    const DType dtype = any_dtype();
    const bool int8 = numbers.percent() < 50;
    Tensor x = normal(dtype, {M, K}, 1, 0, one_of({Layout::compact, Layout::strided}));
    Weight weight(dtype, N, K, int8, one_of({Layout::compact, Layout::strided}));
    Tensor y(dtype, {M, N}, one_of({Layout::compact, Layout::strided}));
    const char* message = int8 ? rwkv6_matvec_int8(any_context(), x.dl(), weight.numbers.dl(),
                                                   weight.scale.dl(), y.dl())
                               : rwkv6_matvec(any_context(), x.dl(), weight.numbers.dl(), y.dl());
    const std::string where = "M " + std::to_string(M) + ", N " + std::to_string(N) + ", K " +
                              std::to_string(K) + (int8 ? ", int8" : "");
    report.check(!message, "matvec, " + where + ": " + (message ? message : ""));
    report.close(y.values(), times(x.values(), weight.values(), size_t(M), size_t(N), size_t(K)),
                 tolerance(dtype), "matvec", where);
    report.check(!y.stray_bytes(), "matvec writes y alone, " + where);
  }
}

void updates(Report& report, int calls) {
  for (int call = 0; call < calls; call++) {
    const int64_t B = between(1, 5), T = one_of<int64_t>({0, 1, 1, 2, 3, 4, 5, 9, 17, 66});
    const int64_t H = between(1, 4), N = one_of<int64_t>({1, 2, 5, 8, 16, 31, 32, 64, 65});
    const int64_t S = B + between(0, 3);
    const DType dtype = any_dtype();
    const auto any_layout = [] {
      return one_of({Layout::compact, Layout::strided, Layout::reversed});
    };
    const auto tokens = [&](double mean = 0) {
      return normal(dtype, {B, T, H, N}, 1, mean, any_layout());
    };
    Tensor r = tokens(), k = tokens(), v = tokens(), w = tokens(-2);
    Tensor u = normal(dtype, numbers.percent() < 50 ? Shape{H, N} : Shape{B, H, N});
    Tensor state = normal(wide(dtype), {S, H, N, N}, 1, 0, any_layout());
    Tensor y(dtype, {B, T, H, N}, any_layout());

    Problem problem = {
        B, T, H, N, r.values(), k.values(), v.values(), w.values(), u.values(), state.values(), {}};
    Values rows;  // of the state, each once; some batch rows are padding
    for (int64_t b = 0; b < B; b++) {
      const bool padding = numbers.percent() < 20;
      rows.push_back(padding ? -1 : double((b + call) % S));
      if (!padding) problem.spans.push_back({b, 0, T, int64_t(rows.back())});
    }
    Tensor map(DType::i64, {B}, Layout::compact, rows);
    const Outputs out = wkv(problem);
    Values expected = problem.initial_state;
    for (size_t m = 0; m < problem.spans.size(); m++)
      std::copy_n(out.final_state.begin() + int64_t(m) * H * N * N, H * N * N,
                  expected.begin() + problem.spans[m].initial * H * N * N);

    const rwkv6_wkv_inputs inputs = {r.dl(), k.dl(),  v.dl(),   w.dl(),
                                     u.dl(), nullptr, map.dl(), nullptr};
    const char* message = rwkv6_wkv_update(any_context(), &inputs, state.dl(), y.dl());
    const std::string where = "B " + std::to_string(B) + ", T " + std::to_string(T) + ", H " +
                              std::to_string(H) + ", N " + std::to_string(N);
    report.check(!message, "update, " + where + ": " + (message ? message : ""));
    report.close(y.values(), out.y, tolerance(dtype), "update y", where);
    report.close(state.values(), expected, dtype == DType::f64 ? 1e-12 : 1e-5, "update state",
                 where);
    report.check(!y.stray_bytes() && !state.stray_bytes(), "update writes y and state, " + where);
  }
}

}  // namespace

void test_sizes(Report& report) {
  layers(report, 60);
  products(report, 60);
  updates(report, 60);
}
