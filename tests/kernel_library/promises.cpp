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

  const char* forward(const rwkv6_context* context = nullptr) {
    return rwkv6_wkv_forward(context, r.dl(), k.dl(), v.dl(), w.dl(), u.dl(), initial.dl(), nullptr,
                             nullptr, y.dl(), final_state.dl());
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
        report.check(!rwkv6_wkv_backward(context, dy.dl(), nullptr, call.r.dl(), call.k.dl(),
                                         call.v.dl(), call.w.dl(), call.u.dl(), call.initial.dl(),
                                         nullptr, nullptr, out[0].dl(), out[1].dl(), out[2].dl(),
                                         out[3].dl(), out[4].dl(), out[5].dl()),
                     "backward in pieces");
        out.push_back(call.y);
        out.push_back(call.final_state);
      }
      for (size_t i = 0; i < outputs[0].size(); i++)
        report.check(
            outputs[0][i].same_bits(outputs[1][i]),
            "the same bits in pieces, N " + std::to_string(N) + ", output " + std::to_string(i));
    }
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
  says(rwkv6_wkv_forward(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                         nullptr, nullptr, nullptr),
       "r: required, got NULL");
  const char* forced = getenv("RWKV6_CPU_ISA");
  if (forced && *forced) says(rwkv6_cpu_isa(), forced);
}

}  // namespace

void test_promises(Report& report) {
  denormals(report);
  same_bits_however_the_work_is_cut(report);
  every_16_bit_float(report, DType::f16, 5);
  every_16_bit_float(report, DType::bf16, 8);
  padding_keeps_the_state(report);
  messages(report);
}
