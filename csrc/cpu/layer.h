// Decoding: one token of each of a few sequences through one layer of RWKV-6.
//
// For one token, reading the weights is what takes time, and so would be calling some seventy small
// operations on a thousand numbers each. Here these are loops between the products with the
// weights. Everything is computed in the accumulator's dtype T.
//
// Included by isa.inc inside the namespace of one instruction set.

RWKV6_INLINE Vec<float> exponential(Vec<float> x) {
  Vec<float> e[1] = {at_most(Vec<float>(88.f), at_least(Vec<float>(-87.f), x)) *
                     Vec<float>(1.44269504f)};
  exp2_lanes(e);
  return e[0];
}
RWKV6_INLINE Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < Vec<double>::W; i++) x.x[i] = std::exp(x.x[i]);
  return x;
}
template <class T>
RWKV6_INLINE Vec<T> sigmoid(Vec<T> x) {
  return Vec<T>(T(1)).x / (Vec<T>(T(1)) + exponential(Vec<T>(T(0)) - x)).x;
}
template <class T>
RWKV6_INLINE Vec<T> hyperbolic_tangent(Vec<T> x) {
  return Vec<T>(T(2)) * sigmoid(x + x) - Vec<T>(T(1));
}

// The mean of f over n values.
template <class T, class F>
RWKV6_INLINE T mean_of(const T* x, int64_t n, const F& f) {
  typedef Vec<T> V;
  V sums(T(0));
  int64_t i = 0;
  for (; i + V::W <= n; i += V::W) sums = sums + f(V::load(x + i));
  T sum = 0;
  for (; i < n; i++) sum += f(V(x[i])).x[0];
  for (int lane = 0; lane < V::W; lane++) sum += sums.x[lane];
  return sum / T(n);
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias, over n values. y may be x.
template <class T>
void normalise(const T* x, int64_t n, double eps, const T* weight, const T* bias, T* y) {
  typedef Vec<T> V;
  const T mean = mean_of(x, n, [](V v) { return v; });
  const T variance = mean_of(x, n, [&](V v) { return (v - V(mean)) * (v - V(mean)); });
  const T scale = T(1 / std::sqrt(double(variance) + eps));
  for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

// Q vectors of columns of y = x W, with x of K values and rows of W `pitch` values apart. Of the last
// vector only the first `columns` exist, if that is not 0.
template <class T, class X, int Q>
RWKV6_INLINE void low_tile(const T* x, int64_t K, const X* W, int64_t pitch, int64_t columns,
                           T* y) {
  typedef Vec<T> V;
  constexpr int64_t kRowsAhead = 16;
  V sum[Q];
  RWKV6_UNROLLED (int q = 0; q < Q; q++) sum[q] = V(T(0));
  for (int64_t k = 0; k < K; k++, W += pitch) {
    __builtin_prefetch(W + kRowsAhead * pitch);
    const X* row = W;
    X rest[V::W] = {};
    if (columns) row = static_cast<const X*>(memcpy(rest, W, size_t(columns) * sizeof(X)));
    RWKV6_UNROLLED (int q = 0; q < Q; q++)
      sum[q] = fma(V(x[k]), load_as<T>(row + q * V::W), sum[q]);
  }
  RWKV6_UNROLLED (int q = 0; q < Q; q++) sum[q].store(y + q * V::W);
}

// y = x W, with x of K values and W of K rows of n values, `pitch` values apart. y has room for n
// values in whole vectors.
template <class T, class X>
void low_product_of(const T* x, int64_t K, const X* W, int64_t n, int64_t pitch, T* y) {
  constexpr int64_t kWidth = Vec<T>::W;
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) low_tile<T, X, 4>(x, K, W + i, pitch, 0, y + i);
  for (; i + kWidth <= n; i += kWidth) low_tile<T, X, 1>(x, K, W + i, pitch, 0, y + i);
  if (i < n) low_tile<T, X, 1>(x, K, W + i, pitch, n - i, y + i);
}

template <class T>
void low_product(const T* x, int64_t K, const char* W, DType dtype, int64_t n, int64_t pitch,
                 T* y) {
  const auto rows_of = [&](auto element) {
    low_product_of<T>(x, K, reinterpret_cast<const decltype(element)*>(W), n, pitch, y);
  };
  if constexpr (sizeof(T) == 8) {
    rows_of(double());
  } else if (dtype == DType::bf16) {
    rows_of(BF16());
  } else if (dtype == DType::f16) {
    rows_of(F16());
  } else {
    rows_of(float());
  }
}

template <class T>
class Layer {
  typedef Vec<T> V;
  static constexpr int kMixes = 5;  // k, v, r, g and w, each with a token shift of its own

  const LayerJob& job;
  const int64_t M, D, F;
  const int64_t pitch, wide;  // length of rows of D and of F values, in whole steps of matvec
  const int64_t ranks;        // the larger rank, in whole vectors
  Scratch<T> scratch;

  struct Rows {  // one for each sequence
    T* data;
    int64_t pitch;
    T* row(int64_t m) const { return data + m * pitch; }
  };
  Rows rows(int64_t row_pitch) { return {scratch.take(M * row_pitch), row_pitch}; }

  const Rows x = rows(pitch);        // residual stream
  const Rows token = rows(pitch);    // x after ln1 or ln2
  const Rows change = rows(pitch);   // the same of the previous token, minus this one's
  const Rows mixed_x = rows(pitch);  // what the data-dependent token shifts are computed from
  const Rows mixed[kMixes] = {rows(pitch), rows(pitch), rows(pitch), rows(pitch), rows(pitch)};
  const Rows k = rows(pitch), v = rows(pitch), r = rows(pitch), g = rows(pitch), w = rows(pitch);
  const Rows y = rows(pitch);
  const Rows hidden = rows(wide);
  const Rows laid_out[4] = {rows(wide), rows(pitch), rows(pitch), rows(pitch)};
  T* const parameters[2] = {scratch.take(pitch), scratch.take(pitch)};
  // Working memory of the low-rank products; every mix has its own, as they run on several threads.
  struct LowRank {
    T* hidden;  // [ranks]
    T* row;     // [pitch], the base that is added
  };
  LowRank low_rank_memory() { return {scratch.take(ranks), scratch.take(pitch)}; }
  const LowRank low[kMixes] = {low_rank_memory(), low_rank_memory(), low_rank_memory(),
                               low_rank_memory(), low_rank_memory()};

  // f(begin, end) over [0, n).
  template <class G>
  void parallel(int64_t n, const G& f) const {
    if (!job.parallel_for) return f(0, n);
    const auto body = [](void* data, int64_t begin, int64_t end) {
      const FlushDenormals flush;
      (*static_cast<const G*>(data))(begin, end);
    };
    job.parallel_for(job.pool, n, body, const_cast<G*>(&f));
  }

  // A parameter of D values, converted to T. Two can be in use at a time: `which` is 0 or 1.
  const T* parameter(const char* values, int which = 0) const {
    load_row(values, job.dtype, D, parameters[which]);
    return parameters[which];
  }

  // out = f(i, m) for all vectors i of all rows m.
  template <class G>
  void each(const Rows& out, int64_t n, const G& f) const {
    for (int64_t m = 0; m < M; m++)
      for (int64_t i = 0; i < n; i += V::W) f(i, m).store(out.row(m) + i);
  }
  static RWKV6_INLINE V at(const Rows& rows, int64_t i, int64_t m) {
    return V::load(rows.row(m) + i);
  }

  // The layer norm of x becomes `token`; `change` is that of the previous token, which `shift`
  // holds, minus this one. `shift` then holds this token for the next call.
  void next_token(const char* weight, const char* bias, const Tokens& shift) const {
    const T *const weights = parameter(weight, 0), *const biases = parameter(bias, 1);
    for (int64_t m = 0; m < M; m++) {
      char* const last = shift.row(m, 0, 0);
      normalise(x.row(m), D, job.ln_eps, weights, biases, token.row(m));
      load_row(last, job.dtype, D, change.row(m));
      store_row(token.row(m), D, job.dtype, last);
    }
    each(change, D, [&](int64_t i, int64_t m) { return at(change, i, m) - at(token, i, m); });
  }

  // out = token + change * maa.
  void mix(const char* maa, const Rows& out) const {
    const T* const share = parameter(maa);
    each(out, D, [&](int64_t i, int64_t m) {
      return fma(at(change, i, m), V::load(share + i), at(token, i, m));
    });
  }

  // out = base + tanh(x w1) w2, with w1 [D, w1_pitch] and w2 [rank, D].
  void low_rank(const Rows& x, const char* w1, int64_t w1_pitch, const char* w2, int64_t rank,
                const char* base, const LowRank& own, const Rows& out) const {
    for (int64_t m = 0; m < M; m++) {
      low_product(x.row(m), D, w1, job.dtype, rank, w1_pitch, own.hidden);
      for (int64_t i = 0; i < rank; i += V::W)
        hyperbolic_tangent(V::load(own.hidden + i)).store(own.hidden + i);
      low_product(own.hidden, rank, w2, job.dtype, D, D, out.row(m));
    }
    load_row(base, job.dtype, D, own.row);
    each(out, D, [&](int64_t i, int64_t m) { return at(out, i, m) + V::load(own.row + i); });
  }

  // One of the data-dependent token shifts; from the last one also w.
  void mix_one(int64_t i) const {
    const char* const maa[kMixes] = {job.att_time_maa_k, job.att_time_maa_v, job.att_time_maa_r,
                                     job.att_time_maa_g, job.att_time_maa_w};
    const int64_t stored[kMixes] = {1, 2, 3, 4, 0};  // place in the weights: w, k, v, r, g
    const int64_t rank = job.mix_rank, bytes = stored[i] * rank * size_of(job.dtype);
    low_rank(mixed_x, job.att_time_maa_w1 + bytes, kMixes * rank, job.att_time_maa_w2 + bytes * D,
             rank, maa[i], low[i], mixed[i]);
    each(mixed[i], D, [&](int64_t j, int64_t m) {
      return fma(at(change, j, m), at(mixed[i], j, m), at(token, j, m));
    });
    if (i == kMixes - 1)
      low_rank(mixed[i], job.att_time_decay_w1, job.decay_rank, job.att_time_decay_w2,
               job.decay_rank, job.att_time_decay, low[i], w);
  }

  struct Product {  // y = x weight^T, with the weight [N, K]
    Rows x;
    const char* weight;
    const float* scale;  // [N], of an int8 weight; nullptr: it has the dtype of the others
    int64_t N, K;
    Rows y;
  };

  // Several products at once, whose rows are shared out among all threads.
  template <int n>
  void project(const Product (&products)[n]) const {
    MatvecJob jobs[n];
    int64_t first[n + 1] = {};
    for (int i = 0; i < n; i++) {
      const Product& p = products[i];
      const DType dtype = p.scale ? DType::i8 : job.dtype;
      for (int64_t m = 0; m < M; m++)
        matvec_layout(p.x.row(m), p.K, dtype, laid_out[i].data + m * matvec_padded<T>(p.K));
      jobs[i] = {M, p.N, p.K, {}, {}, {}, p.scale};
      jobs[i].weight = {const_cast<char*>(p.weight), dtype, p.K, 0, 0};
      jobs[i].y = {reinterpret_cast<char*>(p.y.data), DTypeOf<T>::value, p.y.pitch, 0, 0};
      first[i + 1] = first[i] + jobs[i].units();
    }
    parallel(first[n], [&](int64_t begin, int64_t end) {
      for (int i = 0; i < n; i++) {
        const int64_t from = begin > first[i] ? begin : first[i];
        const int64_t to = end < first[i + 1] ? end : first[i + 1];
        if (from < to)
          matvec_blocks(jobs[i], laid_out[i].data, matvec_padded<T>(jobs[i].K), from - first[i],
                        to - first[i]);
      }
    });
  }

  // WKV6 of one token, and the group norm of y, head by head.
  void recur() const {
    const auto heads = [&](const Rows& rows) {
      return Tokens{reinterpret_cast<char*>(rows.data), DTypeOf<T>::value, rows.pitch, 0, job.N};
    };
    ForwardWork wkv = {};
    wkv.sequences.count = M, wkv.list = job.list;
    wkv.H = job.H, wkv.N = job.N, wkv.parts = 1;
    wkv.r = heads(r), wkv.k = heads(k), wkv.v = heads(v), wkv.w = heads(w), wkv.y = heads(y);
    wkv.u = {const_cast<char*>(job.att_time_faaaa), job.dtype, job.N};
    wkv.initial = wkv.final = job.wkv;
    const T* const weight = parameter(job.att_ln_x_weight, 0);
    const T* const bias = parameter(job.att_ln_x_bias, 1);
    parallel(wkv.units(), [&](int64_t begin, int64_t end) {
      forward(wkv, begin, end);
      for (int64_t unit = begin; unit < end; unit++) {
        const int64_t first = unit % job.H * job.N;
        T* const head = y.row(unit / job.H) + first;
        normalise(head, job.N, job.ln_x_eps, weight + first, bias + first, head);
      }
    });
  }

 public:
  explicit Layer(const LayerJob& layer)
      : job(layer),
        M(job.M),
        D(job.D),
        F(job.F),
        pitch(Scratch<T>::aligned(matvec_padded<T>(D))),
        wide(Scratch<T>::aligned(matvec_padded<T>(F > D ? F : D))),
        ranks(Scratch<T>::aligned(job.mix_rank > job.decay_rank ? job.mix_rank : job.decay_rank)),
        scratch(M * (18 * pitch + 2 * wide) + 2 * pitch + kMixes * (ranks + pitch)) {}

  void run() const {
    for (int64_t m = 0; m < M; m++) load_row(job.x.row(m, 0, 0), job.dtype, D, x.row(m));

    next_token(job.ln1_weight, job.ln1_bias, job.att_shift);
    mix(job.att_time_maa_x, mixed_x);
    parallel(kMixes, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) mix_one(i);
    });
    project<4>({{mixed[0], job.att_key, job.att_key_scale, D, D, k},
                {mixed[1], job.att_value, job.att_value_scale, D, D, v},
                {mixed[2], job.att_receptance, job.att_receptance_scale, D, D, r},
                {mixed[3], job.att_gate, job.att_gate_scale, D, D, g}});
    recur();
    each(y, D,
         [&](int64_t i, int64_t m) { return at(y, i, m) * at(g, i, m) * sigmoid(at(g, i, m)); });
    project<1>({{y, job.att_output, job.att_output_scale, D, D, v}});
    each(x, D, [&](int64_t i, int64_t m) { return at(x, i, m) + at(v, i, m); });

    next_token(job.ln2_weight, job.ln2_bias, job.ffn_shift);
    mix(job.ffn_time_maa_k, k);
    mix(job.ffn_time_maa_r, r);
    project<2>({{k, job.ffn_key, job.ffn_key_scale, F, D, hidden},
                {r, job.ffn_receptance, job.ffn_receptance_scale, D, D, g}});
    each(hidden, F, [&](int64_t i, int64_t m) {
      const V h = at(hidden, i, m), zero(T(0));
      const V positive = h.x < zero.x ? zero.x : h.x;  // a NaN stays a NaN
      return positive * positive;
    });
    project<1>({{hidden, job.ffn_value, job.ffn_value_scale, D, F, v}});
    each(x, D,
         [&](int64_t i, int64_t m) { return fma(sigmoid(at(g, i, m)), at(v, i, m), at(x, i, m)); });

    for (int64_t m = 0; m < M; m++) store_row(x.row(m), D, job.dtype, job.y.row(m, 0, 0));
  }
};

template <class T>
void layer(const LayerJob& job) {
  const FlushDenormals flush;
  Layer<T>(job).run();
}
