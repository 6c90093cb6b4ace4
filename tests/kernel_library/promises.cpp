// What the C interface promises beyond accuracy: the same bits however the work is cut, 16-bit
// floats converted exactly, the caller's floating-point mode left alone, messages for bad calls.
#include <cfloat>
#include <cstdlib>

#include "check.h"
#include "random.h"
#include "tensor.h"

namespace {

using Values = std::vector<double>;

Values normal(size_t n, double mean = 0) {
  static Random random(2);
  Values values(n);
  for (double& x : values) x = mean + random.normal();
  return values;
}

// r, k, v, w [B, T, H, N], u [H, N], and the states [B, H, N, N] that a call starts and ends with.
struct Call {
  Tensor r, k, v, w, u, initial, y, final_state;

  Call(DType dtype, int64_t B, int64_t T, int64_t H, int64_t N)
      : r(dtype, {B, T, H, N}),
        k(dtype, {B, T, H, N}),
        v(dtype, {B, T, H, N}),
        w(DType::f32, {B, T, H, N}),
        u(DType::f32, {H, N}),
        initial(DType::f32, {B, H, N, N}),
        y(dtype, {B, T, H, N}),
        final_state(DType::f32, {B, H, N, N}) {
    for (Tensor* x : {&r, &k, &v, &u, &initial}) x->fill(normal(size_t(x->elements())));
    w.fill(normal(size_t(w.elements()), -2));
  }

  rwkv6_wkv_inputs inputs() {
    return {r.dl(), k.dl(), v.dl(), w.dl(), u.dl(), initial.dl(), nullptr, nullptr};
  }
  const char* forward(const rwkv6_context* context = nullptr) {
    const rwkv6_wkv_inputs given = inputs();
    return rwkv6_wkv_forward(context, &given, y.dl(), final_state.dl(), nullptr);
  }
  // The final state alone, without y.
  const char* state_alone(Tensor& state, const rwkv6_context* context) {
    rwkv6_wkv_inputs given = inputs();
    given.r = given.u = nullptr;
    return rwkv6_wkv_forward(context, &given, nullptr, state.dl(), nullptr);
  }
};

// A pool of four threads that are one, and hands out the work piece by piece, the last first.
const rwkv6_context kPieces = [] {
  rwkv6_context context = {};
  context.parallel_for = [](void*, int64_t n, void (*body)(void*, int64_t, int64_t), void* data) {
    for (int64_t i = n - 1; i >= 0; i--) body(data, i, i + 1);
  };
  context.num_threads = 4;
  return context;
}();

void same_bits_however_the_work_is_cut(Report& report) {
  for (int64_t N : {40, 64, 256}) {
    for (DType dtype : {DType::f32, DType::bf16}) {
      const int64_t B = 2, T = 70, H = N < 256 ? 2 : 1;
      Call call(dtype, B, T, H, N);
      const Tensor grad_y(dtype, {B, T, H, N}, Layout::compact, normal(size_t(B * T * H * N)));
      std::vector<Tensor> outputs[2];
      for (const rwkv6_context* context : {static_cast<const rwkv6_context*>(nullptr), &kPieces}) {
        std::vector<Tensor>& out = outputs[context != nullptr];
        Tensor dy = grad_y;
        for (int i = 0; i < 3; i++) out.emplace_back(dtype, std::vector<int64_t>{B, T, H, N});
        out.emplace_back(DType::f32, std::vector<int64_t>{B, T, H, N});
        out.emplace_back(DType::f32, std::vector<int64_t>{H, N});
        out.emplace_back(DType::f32, std::vector<int64_t>{B, H, N, N});
        report.check(!call.forward(context), "forward in pieces");
        const rwkv6_wkv_inputs inputs = call.inputs();
        const rwkv6_wkv_gradients gradients = {out[0].dl(), out[1].dl(), out[2].dl(),
                                               out[3].dl(), out[4].dl(), out[5].dl()};
        report.check(!rwkv6_wkv_backward(context, &inputs, nullptr, dy.dl(), nullptr, &gradients),
                     "backward in pieces");
        out.push_back(call.y);
        out.push_back(call.final_state);
        Tensor alone(DType::f32, {B, H, N, N});
        report.check(!call.state_alone(alone, context), "the state alone in pieces");
        report.check(alone.same_bits(call.final_state),
                     "the same state without y, N " + std::to_string(N));
      }
      for (size_t i = 0; i < outputs[0].size(); i++)
        report.check(
            outputs[0][i].same_bits(outputs[1][i]),
            "the same bits in pieces, N " + std::to_string(N) + ", output " + std::to_string(i));
    }
  }
}

// A batch whose rows have each their own u [B, H, N] gives the bits of calls for one row and its u
// [H, N] at a time, the gradients of u included.
void a_u_for_every_batch_row(Report& report) {
  const int64_t B = 3, T = 37, H = 4, N = 40;
  const auto values = [](const Tensor& x, int64_t b) {
    const Values all = x.values();
    const auto size = int64_t(all.size()) / B;
    return Values(all.begin() + b * size, all.begin() + (b + 1) * size);
  };
  struct WithGradients : Call {
    Tensor grad_y, r_, k_, v_, w_, u_, initial_;
    WithGradients(int64_t B, const std::vector<int64_t>& shape_of_u)
        : Call(DType::f32, B, T, H, N),
          grad_y(r),
          r_(r),
          k_(r),
          v_(r),
          w_(r),
          u_(DType::f32, shape_of_u),
          initial_(initial) {
      u = u_;
      u.fill(normal(size_t(u.elements())));
      grad_y.fill(normal(size_t(grad_y.elements())));
    }
    bool run(const rwkv6_context* context) {
      const rwkv6_wkv_inputs given = inputs();
      const rwkv6_wkv_gradients gradients = {r_.dl(), k_.dl(), v_.dl(),
                                             w_.dl(), u_.dl(), initial_.dl()};
      return !forward(context) && !rwkv6_wkv_backward(context, &given, nullptr, grad_y.dl(),
                                                      final_state.dl(), &gradients);
    }
    std::vector<Tensor*> given() { return {&r, &k, &v, &w, &u, &initial, &grad_y}; }
    std::vector<Tensor*> found() { return {&y, &final_state, &r_, &k_, &v_, &w_, &u_, &initial_}; }
  };
  for (const rwkv6_context* context : {static_cast<const rwkv6_context*>(nullptr), &kPieces}) {
    WithGradients batch(B, {B, H, N});
    report.check(batch.run(context), "a u for every batch row");
    for (int64_t b = 0; b < B; b++) {
      WithGradients row(1, {H, N});
      for (size_t i = 0; i < row.given().size(); i++)
        row.given()[i]->fill(values(*batch.given()[i], b));
      report.check(row.run(context), "a batch row by itself");
      for (size_t i = 0; i < row.found().size(); i++)
        report.check(row.found()[i]->values() == values(*batch.found()[i], b),
                     "batch row " + std::to_string(b) + " by itself, output " + std::to_string(i));
    }
  }
}

// Without batch rows a shared gradient of u is zero, and one for every batch row has no elements.
void an_empty_batch(Report& report) {
  Call call(DType::f32, 0, 5, 2, 8);
  const rwkv6_wkv_inputs inputs = call.inputs();
  Tensor grads(DType::f32, {0, 5, 2, 8}), initial(DType::f32, {0, 2, 8, 8});
  for (const std::vector<int64_t>& shape :
       {std::vector<int64_t>{2, 8}, std::vector<int64_t>{0, 2, 8}}) {
    Tensor u(DType::f32, shape, Layout::compact, Values(16, 7));
    const rwkv6_wkv_gradients gradients = {grads.dl(), grads.dl(), grads.dl(),
                                           grads.dl(), u.dl(),     initial.dl()};
    report.check(!rwkv6_wkv_backward(nullptr, &inputs, nullptr, grads.dl(), nullptr, &gradients),
                 "backward of an empty batch");
    report.check(u.values() == Values(size_t(u.elements()), 0), "gradient of u, empty batch");
    report.check(!u.stray_bytes(), "an empty batch writes beside no gradient of u");
  }
}

// y = u * v for all 16-bit patterns of v that are finite numbers: loaded exactly, and rounded to
// the nearest, ties to even. u has few bits, so that u * v is exact in f32.
void every_16_bit_float(Report& report, DType dtype, int exponent_bits) {
  const int64_t N = 16, B = 65536 / N;
  const int mantissa_bits = 15 - exponent_bits;
  const double half_ulp = std::ldexp(1, -mantissa_bits - 1);
  for (double factor : {1.0, 0.5, -1 - half_ulp, 1 + 3 * half_ulp, 1 + half_ulp / 2}) {
    Call call(dtype, B, 1, 1, N);
    Values one(size_t(B * N), 0), v(size_t(B * N)), expected(size_t(B * N));
    for (size_t i = 0; i < v.size(); i++) {
      const double x = double_of(uint16_t(i), exponent_bits);
      v[i] = std::isfinite(x) && std::fabs(x) >= FLT_MIN ? x : 0;  // f32 denormals count as zero
      const double y = double_of(half_of(factor * v[i], exponent_bits), exponent_bits);
      expected[i] = std::fabs(factor * v[i]) < FLT_MIN ? 0 : y;
      if (i % N == 0) one[i] = 1;
    }
    call.r.fill(one);
    call.k.fill(one);
    call.v.fill(v);
    call.u.fill(Values(size_t(N), factor));
    call.initial.fill(Values(size_t(B * N * N), 0));
    report.check(!call.forward(), "every 16-bit float");
    report.check(call.y.values() == expected,
                 "every 16-bit float, " + std::to_string(exponent_bits) + " exponent bits, times " +
                     std::to_string(factor));
  }
}

void padding_keeps_the_state(Report& report) {
  Call call(DType::f32, 2, 37, 2, 64);
  const Values zeros(size_t(call.k.elements()), 0);
  call.k.fill(zeros);
  call.v.fill(zeros);
  call.w.fill(Values(zeros.size(), -1e9));
  report.check(!call.forward(), "padding");
  report.check(call.final_state.same_bits(call.initial), "padding keeps every bit of the state");
}

bool denormals_are_kept() {
  volatile float f = FLT_MIN, half_f = f / 2;
  volatile double d = DBL_MIN, half_d = d / 2;
  return half_f != 0 && half_d != 0;
}

void denormals(Report& report) {
  report.check(denormals_are_kept(), "denormals before any call");
  Call call(DType::f32, 1, 40, 1, 64);
  call.k.fill(Values(size_t(call.k.elements()), 0));
  call.w.fill(Values(size_t(call.w.elements()), 0));  // decay 1 / e
  call.initial.fill(Values(size_t(call.initial.elements()), 1e-30));
  report.check(!call.forward(), "dying state");
  const Values dead(size_t(call.final_state.elements()), 0);
  report.check(call.final_state.values() == dead, "a state below the normal numbers is zero");
  report.check(denormals_are_kept(), "the caller's floating-point mode is untouched");
}

void messages(Report& report) {
  const auto says = [&](const char* message, const char* expected) {
    const std::string found = message ? message : "nothing";
    report.check(found.find(expected) != std::string::npos, found + " instead of " + expected);
  };
  Call wide(DType::f32, 1, 1, 1, 257);
  says(wide.forward(), "r: expected a head size N from 1 to 256, got 257");
  Call call(DType::f32, 1, 2, 1, 4);
  call.v = Tensor(DType::f32, {1, 2, 1, 5});
  says(call.forward(), "v: expected shape [1, 2, 1, 4] (-1: any), got [1, 2, 1, 5]");
  const rwkv6_wkv_inputs nothing = {};
  Tensor y(DType::f32, {1, 2, 1, 4}), state(DType::f32, {1, 1, 4, 4});
  says(rwkv6_wkv_forward(nullptr, &nothing, y.dl(), nullptr, nullptr), "r: required, got NULL");
  says(rwkv6_wkv_forward(nullptr, &nothing, nullptr, nullptr, nullptr), "k: required, got NULL");
  rwkv6_wkv_inputs given = {};
  given.k = y.dl(), given.v = y.dl(), given.w = y.dl();
  says(rwkv6_wkv_forward(nullptr, &given, nullptr, state.dl(), state.dl()),
       "checkpoints: expected NULL without y");
  given.u = y.dl();
  says(rwkv6_wkv_forward(nullptr, &given, nullptr, state.dl(), nullptr),
       "u: expected NULL without y");
  const char* forced = getenv("RWKV6_CPU_ISA");
  if (forced && *forced) says(rwkv6_cpu_isa(), forced);
}

}  // namespace

void test_promises(Report& report) {
  denormals(report);
  same_bits_however_the_work_is_cut(report);
  a_u_for_every_batch_row(report);
  an_empty_batch(report);
  every_16_bit_float(report, DType::f16, 5);
  every_16_bit_float(report, DType::bf16, 8);
  padding_keeps_the_state(report);
  messages(report);
}
