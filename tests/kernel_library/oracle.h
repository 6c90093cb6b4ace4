// WKV6 and its gradients in float64, as loops over the equations, slow and plain.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

struct Span {  // one sequence: tokens [begin, begin + length) of batch row b
  int64_t b, begin, length;
  int64_t initial;  // the row of initial_state it starts from, -1: zeros
};

struct Problem {  // all row-major
  int64_t B, T, H, N;
  std::vector<double> r, k, v, w;     // [B, T, H, N]
  std::vector<double> u;              // [H, N], or [B, H, N] with one for every batch row
  std::vector<double> initial_state;  // [S, H, N, N], may be empty
  std::vector<Span> spans;            // [M]

  size_t token(const Span& span, int64_t t, int64_t h) const {
    return size_t(((span.b * T + span.begin + t) * H + h) * N);
  }
  size_t u_of(const Span& span, int64_t h) const {
    const bool each = int64_t(u.size()) == B * H * N;
    return size_t(((each ? span.b * H : 0) + h) * N);
  }
  size_t state(int64_t row, int64_t h) const { return size_t((row * H + h) * N * N); }
};

struct Outputs {
  std::vector<double> y;            // [B, T, H, N]
  std::vector<double> final_state;  // [M, H, N, N]
};

struct Gradients {
  std::vector<double> r, k, v, w;     // [B, T, H, N]
  std::vector<double> u;              // as u
  std::vector<double> initial_state;  // [S, H, N, N]
};

inline double decay(double w) { return std::exp(-std::exp(w)); }
inline double decay_slope(double w) {  // d decay / d w
  const double d = decay(w);
  return d == 0 ? 0 : -std::exp(w) * d;
}

// The states before each token and after the last of one sequence and head: [length + 1, N, N].
inline std::vector<double> states_of(const Problem& p, const Span& span, int64_t h) {
  const size_t N = size_t(p.N);
  std::vector<double> states(size_t(span.length + 1) * N * N, 0.0);
  if (span.initial >= 0)
    for (size_t i = 0; i < N * N; i++) states[i] = p.initial_state[p.state(span.initial, h) + i];
  for (int64_t t = 0; t < span.length; t++) {
    const size_t x = p.token(span, t, h);
    const double* S = &states[size_t(t) * N * N];
    double* next = &states[size_t(t + 1) * N * N];
    for (size_t i = 0; i < N; i++) {
      const double d = decay(p.w[x + i]);
      for (size_t j = 0; j < N; j++) next[i * N + j] = d * S[i * N + j] + p.k[x + i] * p.v[x + j];
    }
  }
  return states;
}

inline Outputs wkv(const Problem& p) {
  const size_t N = size_t(p.N);
  Outputs out;
  out.y.assign(p.r.size(), 0.0);
  for (const Span& span : p.spans) {
    for (int64_t h = 0; h < p.H; h++) {
      const std::vector<double> states = states_of(p, span, h);
      for (int64_t t = 0; t < span.length; t++) {
        const size_t x = p.token(span, t, h);
        const double* S = &states[size_t(t) * N * N];
        for (size_t i = 0; i < N; i++) {
          const double bonus = p.u[p.u_of(span, h) + i] * p.k[x + i];
          for (size_t j = 0; j < N; j++)
            out.y[x + j] += p.r[x + i] * (S[i * N + j] + bonus * p.v[x + j]);
        }
      }
      out.final_state.insert(out.final_state.end(), states.end() - int64_t(N * N), states.end());
    }
  }
  return out;
}

// grad_y [B, T, H, N] and grad_final_state [M, H, N, N] back through wkv. Either may be empty: then
// nothing depends on that output, and it has no terms.
inline Gradients wkv_backward(const Problem& p, const std::vector<double>& grad_y,
                              const std::vector<double>& grad_final_state) {
  const size_t N = size_t(p.N);
  Gradients g;
  for (std::vector<double>* x : {&g.r, &g.k, &g.v, &g.w}) x->assign(p.r.size(), 0.0);
  g.u.assign(p.u.size(), 0.0);
  g.initial_state.assign(p.initial_state.size(), 0.0);
  for (size_t m = 0; m < p.spans.size(); m++) {
    const Span& span = p.spans[m];
    for (int64_t h = 0; h < p.H; h++) {
      const std::vector<double> states = states_of(p, span, h);
      std::vector<double> G(N * N, 0.0);  // of the state after t
      bool state_matters = !grad_final_state.empty();
      if (state_matters) std::copy_n(&grad_final_state[p.state(int64_t(m), h)], N * N, G.begin());
      for (int64_t t = span.length - 1; t >= 0; t--) {
        const size_t x = p.token(span, t, h);
        const double* S = &states[size_t(t) * N * N];
        const double *r = &p.r[x], *k = &p.k[x], *v = &p.v[x], *w = &p.w[x];
        const double* u = &p.u[p.u_of(span, h)];
        for (size_t i = 0; i < N; i++) {
          const double d = decay(w[i]);
          double grad_k = 0, grad_decay = 0;
          for (size_t j = 0; j < N && state_matters; j++) {
            double& G_ij = G[i * N + j];
            grad_k += G_ij * v[j];
            g.v[x + j] += G_ij * k[i];
            grad_decay += S[i * N + j] * G_ij;
            G_ij *= d;
          }
          g.k[x + i] = grad_k;
          g.w[x + i] = decay_slope(w[i]) * grad_decay;
        }
        if (grad_y.empty()) continue;
        const double* dy = &grad_y[x];
        double v_dy = 0;
        for (size_t j = 0; j < N; j++) v_dy += v[j] * dy[j];
        for (size_t i = 0; i < N; i++) {
          double grad_r = u[i] * k[i] * v_dy;
          for (size_t j = 0; j < N; j++) {
            grad_r += S[i * N + j] * dy[j];
            g.v[x + j] += r[i] * u[i] * k[i] * dy[j];
            G[i * N + j] += r[i] * dy[j];
          }
          g.r[x + i] = grad_r;
          g.k[x + i] += u[i] * r[i] * v_dy;
          g.u[p.u_of(span, h) + i] += r[i] * k[i] * v_dy;
        }
        state_matters = true;
      }
      if (span.initial >= 0)
        for (size_t i = 0; i < N * N; i++) g.initial_state[p.state(span.initial, h) + i] += G[i];
    }
  }
  return g;
}
