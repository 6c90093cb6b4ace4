// The recurrent backward of one chunk, step by step, in shared memory. The formulas are at the head
// of wkv_backward_recurrent.cu, which alone includes this.
#pragma once

#include "cuda/recurrent_backward_rows.cuh"

namespace rwkv6::cuda {
namespace {

// F_t r_t, B_t k_t and the product of all decays, every key by itself.
template <class T, int P>
__device__ void apply_decays(Backward<T, P>& back) {
  constexpr int C = Shape<T, P>::kChunk;
  const Lane<T, P> lane;
  const int i = lane.own_key;
  if (!lane.owns) return;
  T d[C], product = 1, change = 0;  // as long as it is large, the product - 1
#pragma unroll
  for (int t = 0; t < C; t++) {
    const T m = change_of_rate(elements(back.w[t])[i]);
    d[t] = kept_of(m) + m;
    elements(back.fr[t])[i] = product * elements(back.r[t])[i];
    product *= d[t];
    change = m * change + (m + change);
  }
  elements(back.change)[i] = product < T(0.5) ? product : -fabs(change);  // see decay.cuh
  product = 1;
#pragma unroll
  for (int t = C - 1; t >= 0; t--) {
    elements(back.bk[t])[i] = product * elements(back.k[t])[i];
    product *= d[t];
  }
}

// M, two tokens by two tokens.
template <class T, int P>
__device__ void multiply_values(Backward<T, P>& back) {
  constexpr int C = Shape<T, P>::kChunk;
#pragma unroll 1
  for (int at = threadIdx.x; at < C / 2 * (C / 2); at += blockDim.x) {
    const int t = at / (C / 2) * 2, s = at % (C / 2) * 2;
    if (s > t) continue;
    T sum[2][2] = {};
#pragma unroll 2
    for (int p = 0; p < Shape<T, P>::kRowPacks; p++) {
      const Pack<T> y0 = back.grad_y[t][p], y1 = back.grad_y[t + 1][p];
      const Pack<T> v0 = back.v[s][p], v1 = back.v[s + 1][p];
#pragma unroll
      for (int e = 0; e < Pack<T>::kSize; e++) {
        sum[0][0] += y0.x[e] * v0.x[e];
        sum[0][1] += y0.x[e] * v1.x[e];
        sum[1][0] += y1.x[e] * v0.x[e];
        sum[1][1] += y1.x[e] * v1.x[e];
      }
    }
    back.M[t][s] = sum[0][0];
    back.M[t][s + 1] = sum[0][1];
    back.M[t + 1][s] = sum[1][0];
    back.M[t + 1][s + 1] = sum[1][1];
  }
}

// G v_t and G^T (B_t k_t). The warps' shares of the latter are added up a group of tokens at a
// time.
template <class T, int P>
__device__ void apply_gradient(Backward<T, P>& back, const typename Shape<T, P>::State& G) {
  typedef Shape<T, P> Shape;
  const Lane<T, P> lane;
#pragma unroll 1
  for (int t0 = 0; t0 < Shape::kChunk; t0 += Shape::kGroup) {
    auto& partial = back.partial[t0 / Shape::kGroup % 2];
#pragma unroll 1
    for (int g = 0; g < Shape::kGroup; g++) {
      const int t = t0 + g;
      const Pack<T> bk = back.bk[t][lane.key_pack];
      T gv[Shape::kKeys] = {}, gk[Shape::kColumns];
#pragma unroll
      for (int p = 0; p < Shape::kColumnPacks; p++) {
        const Pack<T> v = back.v[t][lane.column_pack(p)];
#pragma unroll
        for (int c = 0; c < Shape::kPack; c++) {
          const int j = p * Shape::kPack + c;
          gk[j] = 0;
#pragma unroll
          for (int a = 0; a < Shape::kKeys; a++) {
            gv[a] += G[a][j] * v.x[c];
            gk[j] += G[a][j] * bk.x[a];
          }
        }
      }
      lane.sum_columns(gv, back.bk[t]);
      const int first = sum_lanes<Shape::kColumns, Shape::kColumnLanes, 16>(gk, lane.lane);
#pragma unroll
      for (int e = 0; e < Shape::kColumns / Shape::kKeyLanes; e++) {
        const int j = first + e;
        partial[lane.warp][g][lane.column_pack(j / Shape::kPack)].x[j % Shape::kPack] = gk[e];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int at = threadIdx.x; at < Shape::kGroup * Shape::kRowPacks; at += blockDim.x) {
      const int g = at / Shape::kRowPacks, p = at % Shape::kRowPacks;
      Pack<T> sum = partial[0][g][p];
#pragma unroll 1
      for (int warp = 1; warp < blockDim.x / 32; warp++) {
        const Pack<T> share = partial[warp][g][p];
#pragma unroll
        for (int c = 0; c < Shape::kPack; c++) sum.x[c] += share.x[c];
      }
      back.v[t0 + g][p] = sum;
    }
  }
}

// sum_j S G and S dy_t; G becomes the gradient of the state before the chunk.
template <class T, int P>
__device__ void apply_state(Backward<T, P>& back, const typename Shape<T, P>::State& S,
                            typename Shape<T, P>::State& G) {
  typedef Shape<T, P> Shape;
  const Lane<T, P> lane;
  T sums[Shape::kKeys] = {};
  const Pack<T> change = back.change[lane.key_pack];
#pragma unroll
  for (int a = 0; a < Shape::kKeys; a++)
#pragma unroll
    for (int j = 0; j < Shape::kColumns; j++) {
      sums[a] += S[a][j] * G[a][j];
      G[a][j] = kept_of(change.x[a]) * G[a][j] + change.x[a] * G[a][j];
    }
  lane.sum_columns(sums, back.meeting);
#pragma unroll 1
  for (int t = 0; t < Shape::kChunk; t++) {
    const Pack<T> fr = back.fr[t][lane.key_pack];
    T sy[Shape::kKeys] = {};
#pragma unroll
    for (int p = 0; p < Shape::kColumnPacks; p++) {
      const Pack<T> y = back.grad_y[t][lane.column_pack(p)];
#pragma unroll
      for (int a = 0; a < Shape::kKeys; a++)
#pragma unroll
        for (int c = 0; c < Shape::kPack; c++) {
          sy[a] += S[a][p * Shape::kPack + c] * y.x[c];
          G[a][p * Shape::kPack + c] += fr.x[a] * y.x[c];
        }
    }
    lane.sum_columns(sy, back.fr[t]);
  }
  __syncwarp();
}

// The pairs of the chunk, every key by itself: dr, dk and dw in the place of r, k and the rates,
// the warp's share of A, and du so far.
//
// D[s] is D(s, t). `passed` is what arrives at t of the sources met so far, first S, then the
// tokens one by one: passing s on their way, they are q's at s.
template <class T, int P>
__device__ void intra_chunk_backward(Backward<T, P>& back) {
  constexpr int C = Shape<T, P>::kChunk;
  const Lane<T, P> lane;
  const int i = lane.own_key;
  T k[C], D[C], grad_k[C], q[C];
  const T u = elements(back.u)[i];
  T F = 1, grad_u = 0;
#pragma unroll
  for (int t = 0; t < C; t++) {
    const T r = lane.owns ? elements(back.r[t])[i] : T(0);
    k[t] = lane.owns ? elements(back.k[t])[i] : T(0);
    const T d = lane.owns ? decay_of_rate(elements(back.w[t])[i]) : T(0);
    const T m_tt = back.M[t][t], u_k = u * k[t];
    T passed = lane.owns ? F * elements(back.fr[t])[i] : T(0);
#pragma unroll
    for (int s0 = 0; s0 <= t; s0 += C / 2) {
      T weight[C / 2];  // half a row of A
#pragma unroll
      for (int s = s0; s < s0 + C / 2; s++) {
        weight[s - s0] = s < t ? r * (k[s] * D[s]) : s == t ? r * u_k : T(0);
        if (s >= t) continue;
        const T m_d = D[s] * back.M[t][s];
        q[s] += r * passed;
        grad_k[s] += r * m_d;
        passed += k[s] * m_d;
        D[s] *= d;
      }
      const int s = s0 + sum_lanes<C / 2, 1, 16>(weight, lane.lane);
      if (lane.lane % (64 / C) == 0) back.A_parts[lane.warp][t][s] = weight[0];
    }
    D[t] = 1;
    q[t] = 0;
    grad_k[t] = u * r * m_tt;
    grad_u += r * m_tt * k[t];
    if (lane.owns) elements(back.r[t])[i] = passed + m_tt * u_k;
    F *= d;
  }
  if (!lane.owns) return;
  elements(back.grad_u)[i] += grad_u;
  T passed = F * elements(back.meeting)[i];  // at G
#pragma unroll
  for (int s = 0; s < C; s++) {
    const T arriving = D[s] * elements(back.bk[s])[i];
    q[s] += passed;
    passed += k[s] * arriving;
    elements(back.k[s])[i] = grad_k[s] + arriving;
    T& rate = elements(back.w[s])[i];
    rate = rate == 0 ? T(0) : -rate * q[s];
  }
}

}  // namespace
}  // namespace rwkv6::cuda
