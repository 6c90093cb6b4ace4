// RWKV-4's operator, backward: the adjoint of the recurrence, channel by channel.
//
// A forward pass keeps the state before every segment of about sqrt(T) tokens. Then, segment by
// segment from the last to the first, the state before each token is recomputed and the gradients
// follow in reverse order, so a thread needs memory for O(sqrt(T)) states. y does not depend on the
// p that a and b are taken relative to, only on the exponents themselves; the gradient of the
// state's p goes to whichever exponent was the larger one. The formulas are those of
// torch_rwkv6/reference4.py.
//
// Included by isa.inc inside the namespace of one instruction set.

// The gradient of the state after a token, which becomes that of the state before it.
template <class T>
struct AverageGrad {
  typedef Vec<T> V;
  V a, b, p;

  RWKV6_INLINE AverageGrad(V a, V b, V p) : a(a), b(b), p(p) {}

  static RWKV6_INLINE V minus(V x, V y) { return V(x.x - y.x); }

  // The adjoint of Average::add: returns the gradient that p and decay share, sets those of k and
  // v.
  RWKV6_INLINE V add(const Average<T>& before, const Average<T>& after, V k, V v, V decay,
                     V& grad_k, V& grad_v) {
    const V kept = before.p + decay;
    const Factors<T> f(kept, k);
    const auto zero = V(T(0)).x;
    const auto grad_max = minus(p, fma(after.a, a, after.b * b)).x;
    const auto from_old = kept.x > k.x ? grad_max : zero, from_new = kept.x > k.x ? zero : grad_max;
    p = fma(f.of_x, fma(before.a, a, before.b * b), V(from_old));
    grad_k = fma(f.of_y, fma(v, a, b), V(from_new));
    grad_v = f.of_y * a;
    a = f.of_x * a, b = f.of_x * b;
    return p;
  }

  // The adjoint of Average::y: returns the gradient that u and k share, adds to that of v.
  RWKV6_INLINE V y(const Average<T>& before, V k, V v, V u, V grad_y, V& grad_v) {
    const Factors<T> f(before.p, u + k);
    const V total = fma(f.of_x, before.b, f.of_y);
    const V y = V(fma(f.of_x, before.a, f.of_y * v).x / total.x);
    const V g = V(grad_y.x / total.x), old = f.of_x * g, now = f.of_y * g;
    a = a + old;
    b = minus(b, old * y);
    p = fma(old, minus(before.a, before.b * y), p);
    grad_v = grad_v + now;
    return now * minus(v, y);
  }
};

template <class T>
void wkv4_backward(const Wkv4Job& job, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  typedef Vec<T> V;
  constexpr int64_t C = Channels<T>::C;
  int64_t segment = 1;
  while (segment * segment < job.T) segment++;
  const int64_t segments = (job.T + segment - 1) / segment;
  Scratch<T> scratch((segments + segment + 1) * 3 * C);
  T* const checkpoints = scratch.take(segments * 3 * C);  // before the first token of each segment
  T* const states = scratch.take((segment + 1) * 3 * C);  // before each of its tokens, and after
  each_block_of_channels<T>(job, begin, end, [&](int64_t b, const Channels<T>& channels) {
    const int64_t width = channels.vectors * V::W;
    alignas(64) T k[C], v[C], grad_y[C], grad[3 * C], grad_w[C] = {}, grad_u[C] = {};
    const auto load = [&](int64_t t) {
      channels.load(job.k.row(b, t, 0), job.k.dtype, k);
      channels.load(job.v.row(b, t, 0), job.v.dtype, v);
    };
    // Computes the states after tokens [from, to) from the one before them. `keep` is the distance
    // from one state to the next: 3 * C, or 0 to keep only the last.
    const auto recompute_states = [&](int64_t from, int64_t to, T* state, int64_t keep) {
      for (int64_t t = from; t < to; t++, state += keep) {
        load(t);
        for (int64_t j = 0; j < width; j += V::W) {
          Average<T> average = Channels<T>::get(state, j);
          average.add(V::load(k + j), V::load(v + j), V::load(channels.decay + j));
          Channels<T>::put(average, j, state + keep);
        }
      }
    };
    channels.load_state(job.initial, b, states);
    for (int64_t s = 0; s < segments; s++) {
      memcpy(checkpoints + s * 3 * C, states, 3 * C * sizeof(T));
      if (s + 1 < segments) recompute_states(s * segment, (s + 1) * segment, states, 0);
    }
    for (int64_t i = 0; i < 3; i++)
      channels.load(job.grad_final.matrix(b, i), job.grad_final.dtype, grad + i * C);
    for (int64_t s = segments; s-- > 0;) {
      const int64_t first = s * segment, last = first + segment < job.T ? first + segment : job.T;
      memcpy(states, checkpoints + s * 3 * C, 3 * C * sizeof(T));
      recompute_states(first, last, states, 3 * C);
      for (int64_t t = last; t-- > first;) {
        load(t);
        channels.load(job.grad_y.row(b, t, 0), job.grad_y.dtype, grad_y);
        const T* const before = states + (t - first) * 3 * C;
        for (int64_t j = 0; j < width; j += V::W) {
          const Average<T> old = Channels<T>::get(before, j);
          const Average<T> now = Channels<T>::get(before + 3 * C, j);
          const V k_j = V::load(k + j), v_j = V::load(v + j);
          AverageGrad<T> g(V::load(grad + j), V::load(grad + C + j), V::load(grad + 2 * C + j));
          V grad_k, grad_v;
          const V grad_decay =
              g.add(old, now, k_j, v_j, V::load(channels.decay + j), grad_k, grad_v);
          (V::load(grad_w + j) + grad_decay).store(grad_w + j);
          if (job.grad_y.data) {
            const V grad_uk =
                g.y(old, k_j, v_j, V::load(channels.u + j), V::load(grad_y + j), grad_v);
            (V::load(grad_u + j) + grad_uk).store(grad_u + j);
            grad_k = grad_k + grad_uk;
          }
          grad_k.store(k + j);  // the gradients take the places of k and v
          grad_v.store(v + j);
          g.a.store(grad + j), g.b.store(grad + C + j), g.p.store(grad + 2 * C + j);
        }
        channels.store(k, job.grad_k.dtype, job.grad_k.row(b, t, 0));
        channels.store(v, job.grad_v.dtype, job.grad_v.row(b, t, 0));
      }
    }
    alignas(64) T w[C];
    channels.load(job.w.row(0), job.w.dtype, w);
    T* const out_w = static_cast<T*>(job.grad_w_terms) + b * job.D + channels.first;
    T* const out_u = static_cast<T*>(job.grad_u_terms) + b * job.D + channels.first;
    for (int64_t i = 0; i < channels.n; i++) {
      out_w[i] = grad_w[i] * (w[i] >= T(80) ? T(0) : channels.decay[i]);  // bounded there
      out_u[i] = grad_u[i];
    }
    if (!job.grad_initial.data) return;
    for (int64_t i = 0; i < 3; i++)
      channels.store(grad + i * C, job.grad_initial.dtype, job.grad_initial.matrix(b, i));
  });
}
