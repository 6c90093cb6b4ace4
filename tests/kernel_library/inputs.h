// The inputs of one call, for every combination of options worth telling apart.
#pragma once

#include <optional>

#include "oracle.h"
#include "random.h"
#include "tensor.h"

enum class StateUse { none, each, shared, mapped };

// One combination of the options; together they meet every option.
struct Form {
  const char* name;
  int64_t batch = 2;
  Layout layout = Layout::compact;
  StateUse states = StateUse::none;
  bool packed = false;       // cu_seqlens instead of batch rows
  bool side_in_f32 = false;  // w and u in float32 beside half precision
  bool state_as_r = false;   // initial_state in r's dtype
  DType index = DType::i64;  // of state_map and cu_seqlens
  bool extreme = true;       // decays at and beyond the edge of what floats hold
  bool u_each = false;       // a u, and a gradient of u, of its own for every batch row
  bool grad_y = true, grad_final = true;
};
inline const Form kForms[] = {
    {.name = "plain", .extreme = false, .grad_final = false},
    {.name = "state each, strided, w and u in f32",
     .layout = Layout::strided,
     .states = StateUse::each,
     .side_in_f32 = true},
    {.name = "state map, reversed, state as r",
     .batch = 3,
     .layout = Layout::reversed,
     .states = StateUse::mapped,
     .state_as_r = true},
    {.name = "packed, shared state",
     .batch = 1,
     .states = StateUse::shared,
     .packed = true,
     .index = DType::i32},
    {.name = "packed, state map, reversed",
     .batch = 1,
     .layout = Layout::reversed,
     .states = StateUse::mapped,
     .packed = true,
     .side_in_f32 = true,
     .index = DType::i32,
     .grad_y = false},
    {.name = "u each, strided, state each",
     .batch = 3,
     .layout = Layout::strided,
     .states = StateUse::each,
     .side_in_f32 = true,
     .u_each = true},
    {.name = "u each, packed, reversed",
     .batch = 1,
     .layout = Layout::reversed,
     .states = StateUse::mapped,
     .packed = true,
     .u_each = true},
};

// The inputs of a call, and the same numbers for the oracle.
struct Inputs {
  DType dtype, acc;
  int64_t B, T, H, N;
  Layout layout;
  Random random{1};
  Problem exact;
  Tensor r, k, v, w, u;
  std::optional<Tensor> initial, map, offsets;

  std::vector<int64_t> tokens() const { return {B, T, H, N}; }
  std::vector<int64_t> states(int64_t rows) const { return {rows, H, N, N}; }
  std::vector<int64_t> shape_of_u(const Form& form) const {
    return form.u_each ? std::vector<int64_t>{B, H, N} : std::vector<int64_t>{H, N};
  }
  int64_t sequences() const { return int64_t(exact.spans.size()); }

  Inputs(const Form& form, DType dtype, int64_t N, int64_t T)
      : dtype(dtype),
        acc(dtype == DType::f64 ? DType::f64 : DType::f32),
        B(form.batch),
        T(T),
        H(N < 128 ? 128 / N : 1),  // enough elements for a root mean square
        N(N),
        layout(form.layout),
        r(normal(dtype, tokens())),
        k(normal(dtype, tokens())),
        v(normal(dtype, tokens())),
        w(normal(side(form), tokens(), -2, form.extreme)),
        u(normal(side(form), shape_of_u(form))) {
    exact = {B, T, H, N, r.values(), k.values(), v.values(), w.values(), u.values(), {}, {}};
    if (form.packed) {
      const int64_t cut = T / 3;  // the second of three sequences is empty
      exact.spans = {{0, 0, cut, -1}, {0, cut, 0, -1}, {0, cut, T - cut, -1}};
      offsets.emplace(form.index, std::vector<int64_t>{4}, Layout::compact,
                      std::vector<double>{0, double(cut), double(cut), double(T)});
    } else {
      for (int64_t b = 0; b < B; b++) exact.spans.push_back({b, 0, T, -1});
    }
    if (form.states == StateUse::none) return;
    int64_t rows = sequences();
    for (int64_t m = 0; m < rows; m++) exact.spans[size_t(m)].initial = m;
    if (form.states == StateUse::shared) {
      rows = 1;
      for (Span& span : exact.spans) span.initial = 0;
    } else if (form.states == StateUse::mapped) {
      rows = 4;  // one of them twice, two of them never
      const std::vector<double> places = {2, 0, 2};
      map.emplace(form.index, std::vector<int64_t>{3}, Layout::compact, places);
      for (size_t m = 0; m < 3; m++) exact.spans[m].initial = int64_t(places[m]);
    }
    initial.emplace(normal(form.state_as_r ? dtype : acc, states(rows)));
    exact.initial_state = initial->values();
  }

  // As the C interface takes them.
  rwkv6_wkv_inputs dl() {
    const auto optional = [](std::optional<Tensor>& x) { return x ? x->dl() : nullptr; };
    return {r.dl(),        k.dl(),           v.dl(), w.dl(), u.dl(), optional(initial),
            optional(map), optional(offsets)};
  }

  DType side(const Form& form) const {  // of w and u
    return form.side_in_f32 && dtype != DType::f64 ? DType::f32 : dtype;
  }

  Tensor normal(DType of, std::vector<int64_t> shape, double mean = 0, bool extreme = false) {
    Tensor x(of, std::move(shape), layout);
    const double edge[] = {5, 10, 20, 90, -1e9, INFINITY, -INFINITY};
    std::vector<double> values(size_t(x.elements()));
    for (double& value : values) {
      const int place = extreme ? random.percent() : 99;
      value = place < 7 ? edge[place] : mean + random.normal();
    }
    x.fill(values);
    return x;
  }
};
