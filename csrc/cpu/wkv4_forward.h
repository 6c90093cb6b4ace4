// RWKV-4's operator, forward: token by token, each channel with its own weighted average.
//
// The average's numerator a and denominator b are kept relative to e^p. Of the two terms that a
// step adds, the one with the larger exponent has the factor 1, so a step needs one exponential for
// y and one for the state.
//
// Included by isa.inc inside the namespace of one instruction set.

constexpr int64_t kChannelVectors = 4;  // computed together: enough to hide the latency of an exp

// e^x for x <= 0, exactly 0 where that is too small for the dtype; a NaN stays a NaN.
RWKV6_INLINE Vec<float> exp_of_negative(Vec<float> x) {
  typedef Vec<float> V;
  const V low(-87.f);
  V e[1] = {at_least(low, x) * V(1.44269504f)};
  exp2_lanes(e);
  return FloatLanes(x.x < low.x ? V(0.f).x : e[0].x);
}
RWKV6_INLINE Vec<double> exp_of_negative(Vec<double> x) {
  double lanes[Vec<double>::W];
  x.store(lanes);
  for (double& lane : lanes) lane = std::exp(lane);
  return Vec<double>::load(lanes);
}

// The larger of two exponents; NaN if one of them is.
template <class T>
RWKV6_INLINE Vec<T> larger(Vec<T> x, Vec<T> y) {
  const auto other = x.x > y.x ? x.x : (x + y).x;
  return Vec<T>(x.x <= y.x ? y.x : other);
}

// The factors of two terms with exponents x and y relative to the larger one, max:
//   e^(x - max), e^(y - max)
// NaN where an exponent is infinite.
template <class T>
struct Factors {
  Vec<T> of_x, of_y;

  RWKV6_INLINE Factors(Vec<T> x, Vec<T> y) {
    const auto difference = x.x - y.x, minus = y.x - x.x;
    const auto zero = Vec<T>(T(0)).x;
    const Vec<T> max = larger(x, y);
    const auto one = (Vec<T>(T(1)) + (max - max)).x;
    const auto smaller = exp_of_negative(Vec<T>(difference > zero ? minus : difference)).x;
    of_x.x = difference > zero ? one : smaller;
    of_y.x = difference > zero ? smaller : one;
  }
};

// The state a, b and p of one vector of channels.
template <class T>
struct Average {
  Vec<T> a, b, p;

  RWKV6_INLINE Average(Vec<T> a, Vec<T> b, Vec<T> p) : a(a), b(b), p(p) {}

  RWKV6_INLINE Vec<T> y(Vec<T> k, Vec<T> v, Vec<T> u) const {
    const Factors<T> f(p, u + k);
    return Vec<T>(fma(f.of_x, a, f.of_y * v).x / fma(f.of_x, b, f.of_y).x);
  }

  RWKV6_INLINE void add(Vec<T> k, Vec<T> v, Vec<T> decay) {
    const Vec<T> kept = p + decay;
    const Factors<T> f(kept, k);
    a = fma(f.of_x, a, f.of_y * v);
    b = fma(f.of_x, b, f.of_y);
    p = larger(kept, k);
  }
};

// The channels [first, first + n) of a job: up to kChannelVectors vectors, padded with zeros.
template <class T>
struct Channels {
  static constexpr int64_t C = kChannelVectors * Vec<T>::W;
  int64_t first, n, vectors;
  alignas(64) T decay[C], u[C];  // decay = -exp(w), bounded at w = 80

  Channels(const Wkv4Job& job, int64_t first, int64_t n)
      : first(first), n(n), vectors((n + Vec<T>::W - 1) / Vec<T>::W) {
    alignas(64) T factor[C] = {};
    load(job.w.row(0), job.w.dtype, decay);
    load(job.u.row(0), job.u.dtype, u);
    decay_row(decay, n, factor, decay);  // decay becomes the rate, exp(w)
    for (int64_t i = 0; i < vectors * Vec<T>::W; i++) decay[i] = -decay[i];
  }

  // Loads or stores these channels of a row of D values; a null row is zeros.
  void load(const char* row, DType dtype, T* out) const {
    load_row(row ? row + first * size_of(dtype) : nullptr, dtype, n, out);
  }
  void store(const T* in, DType dtype, char* row) const {
    store_row(in, n, dtype, row + first * size_of(dtype));
  }

  // a, b and p of batch row b, [3, C]; without states, those of an empty average.
  void load_state(const States& states, int64_t b, T* out) const {
    if (states.data) {
      for (int64_t i = 0; i < 3; i++) load(states.matrix(b, i), states.dtype, out + i * C);
      return;
    }
    const Vec<T> zero(T(0));
    const Average<T> start(zero, zero, Vec<T>(T(-1e30)));
    for (int64_t j = 0; j < C; j += Vec<T>::W) put(start, j, out);
  }
  static RWKV6_INLINE Average<T> get(const T* state, int64_t j) {
    return {Vec<T>::load(state + j), Vec<T>::load(state + C + j), Vec<T>::load(state + 2 * C + j)};
  }
  static RWKV6_INLINE void put(const Average<T>& x, int64_t j, T* state) {
    x.a.store(state + j), x.b.store(state + C + j), x.p.store(state + 2 * C + j);
  }
};

// f(batch row, channels) over the work units [begin, end).
template <class T, class F>
RWKV6_INLINE void each_block_of_channels(const Wkv4Job& job, int64_t begin, int64_t end,
                                         const F& f) {
  for (int64_t unit = begin; unit < end; unit++) {
    const Columns part = columns_of(unit % job.parts, job.parts, job.D, Vec<T>::W);
    for (int64_t first = part.first; first < part.last; first += Channels<T>::C) {
      const int64_t left = part.last - first;
      f(unit / job.parts, Channels<T>(job, first, left < Channels<T>::C ? left : Channels<T>::C));
    }
  }
}

template <class T>
void wkv4_forward(const Wkv4Job& job, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  typedef Vec<T> V;
  constexpr int64_t C = Channels<T>::C;
  each_block_of_channels<T>(job, begin, end, [&](int64_t b, const Channels<T>& channels) {
    alignas(64) T state[3 * C], k[C], v[C];
    channels.load_state(job.initial, b, state);
    for (int64_t t = 0; t < job.T; t++) {
      channels.load(job.k.row(b, t, 0), job.k.dtype, k);
      channels.load(job.v.row(b, t, 0), job.v.dtype, v);
      for (int64_t j = 0; j < channels.vectors * V::W; j += V::W) {
        Average<T> average = Channels<T>::get(state, j);
        const V k_j = V::load(k + j), v_j = V::load(v + j);
        average.y(k_j, v_j, V::load(channels.u + j)).store(v + j);  // y takes the place of v
        average.add(k_j, v_j, V::load(channels.decay + j));
        Channels<T>::put(average, j, state);
      }
      channels.store(v, job.y.dtype, job.y.row(b, t, 0));
    }
    for (int64_t i = 0; i < 3; i++)
      channels.store(state + i * C, job.final.dtype, job.final.matrix(b, i));
  });
}
