// The product of a weight with a few vectors, y = x weight^T: the main work of decoding, limited by
// the time to read the weight.
//
// The rows of the weight are read as a few sequential streams side by side, each with prefetches
// far ahead, which continue into the next row and the next page. What was read is used for all rows
// of x. Every element of y is summed in the same order, however rows are grouped and work is cut.
//
// Included by isa.inc inside the namespace of one instruction set.

constexpr int64_t kPrefetch = 2048;  // how many bytes ahead each stream is prefetched
constexpr int kStreams = 4;          // rows of the weight that are read side by side
constexpr int kVectors = 2;          // rows of x that are multiplied at a time

// Loads two vectors of a row of the weight in the accumulator's dtype. bf16 is converted most
// cheaply into the even and the odd elements, so the elements of x are put into that order for it.
// int8 becomes whole numbers; the sum of a row is multiplied by the row's scale at the end.
template <class T, DType D>
RWKV6_INLINE void load_pair(const char* p, Vec<T>& x, Vec<T>& y) {
  if constexpr (D == DType::bf16) {
    Uint32Lanes bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    x.x = (FloatLanes)(bits << 16);
    y.x = (FloatLanes)(bits & 0xffff0000u);
  } else if constexpr (D == DType::f16) {
    x = load_as<T>(reinterpret_cast<const F16*>(p));
    y = load_as<T>(reinterpret_cast<const F16*>(p) + Vec<T>::W);
  } else if constexpr (D == DType::i8) {
    x = load_as<T>(reinterpret_cast<const int8_t*>(p));
    y = load_as<T>(reinterpret_cast<const int8_t*>(p) + Vec<T>::W);
  } else {
    x = Vec<T>::load(reinterpret_cast<const T*>(p));
    y = Vec<T>::load(reinterpret_cast<const T*>(p) + Vec<T>::W);
  }
}

// Adds one step, two vectors of R rows of the weight at w[r] + at, times M rows of x.
template <class T, DType D, int M, int R>
RWKV6_INLINE void matvec_step(const T* x, int64_t padded, const char* const (&w)[R], int64_t at,
                              Vec<T> (&sum)[M][R][2]) {
  typedef Vec<T> V;
  RWKV6_UNROLLED (int r = 0; r < R; r++) {
    V first, second;
    load_pair<T, D>(w[r] + at, first, second);
    RWKV6_UNROLLED (int a = 0; a < M; a++) {
      sum[a][r][0] = fma(V::load(x + a * padded), first, sum[a][r][0]);
      sum[a][r][1] = fma(V::load(x + a * padded + V::W), second, sum[a][r][1]);
    }
  }
}

// R rows of the weight, `distance` rows apart, times M rows of x, [M, padded]. The two vectors of a
// step have sums of their own.
template <class T, DType D, int M, int R>
RWKV6_INLINE void matvec_tile(const MatvecJob& job, const T* x, int64_t padded, int64_t row,
                              int64_t distance, int64_t m) {
  typedef Vec<T> V;
  constexpr int64_t kStep = 2 * V::W;
  const int64_t whole = job.K / kStep * kStep, size = size_of(D);
  const char* w[R];
  V sum[M][R][2];
  RWKV6_UNROLLED (int r = 0; r < R; r++) {
    w[r] = job.weight.row(row + r * distance, 0, 0);
    RWKV6_UNROLLED (int a = 0; a < M; a++) sum[a][r][0] = sum[a][r][1] = V(T(0));
  }
  for (int64_t k = 0; k < whole; k += kStep) {
    if (k * size % 64 == 0)  // once for each cache line
      RWKV6_UNROLLED (int r = 0; r < R; r++) __builtin_prefetch(w[r] + k * size + kPrefetch);
    matvec_step<T, D, M, R>(x + k, padded, w, k * size, sum);
  }
  if (whole < job.K) {  // the last elements of the rows, padded with zeros
    alignas(64) char rest[R][kStep * sizeof(T)] = {};
    const char* p[R];
    RWKV6_UNROLLED (int r = 0; r < R; r++) {
      memcpy(rest[r], w[r] + whole * size, size_t((job.K - whole) * size));
      p[r] = rest[r];
    }
    matvec_step<T, D, M, R>(x + whole, padded, p, 0, sum);
  }
  const DType dtype = job.y.dtype;
  for (int a = 0; a < M; a++) {
    V total[R];
    RWKV6_UNROLLED (int r = 0; r < R; r++) total[r] = sum[a][r][0] + sum[a][r][1];
    T y[R + V::W];
    store_sums<R>(total, y);
    char* const out = job.y.row(m + a, 0, 0);
    RWKV6_UNROLLED (int r = 0; r < R; r++) {
      const int64_t n = row + r * distance;
      if (D == DType::i8) y[r] *= T(job.scale[n]);
      store_value(y[r], dtype, out + n * size_of(dtype));
    }
  }
}

// One tile of the weight times all rows of x, kVectors at a time; the tile stays in cache
// meanwhile.
template <class T, DType D, int R>
void matvec_tiles(const MatvecJob& job, const T* x, int64_t padded, int64_t row, int64_t distance) {
  int64_t m = 0;
  for (; m + kVectors <= job.M; m += kVectors)
    matvec_tile<T, D, kVectors, R>(job, x + m * padded, padded, row, distance, m);
  for (; m < job.M; m++) matvec_tile<T, D, 1, R>(job, x + m * padded, padded, row, distance, m);
}

// The rows [first, last) of the weight times all rows of x.
template <class T, DType D>
void matvec_rows_of(const MatvecJob& job, const T* x, int64_t padded, int64_t first, int64_t last) {
  const int64_t length = (last - first) / kStreams;
  for (int64_t i = first; i < first + length; i++)
    matvec_tiles<T, D, kStreams>(job, x, padded, i, length);
  for (int64_t i = first + kStreams * length; i < last; i++)
    matvec_tiles<T, D, 1>(job, x, padded, i, 0);
}

// The blocks [begin, end) of rows of the weight times x, whose rows come from matvec_layout.
template <class T>
void matvec_blocks(const MatvecJob& job, const T* x, int64_t padded, int64_t begin, int64_t end) {
  const int64_t first = begin * kMatvecRows;
  const int64_t last = end * kMatvecRows < job.N ? end * kMatvecRows : job.N;
  if (job.weight.dtype == DType::i8) {
    matvec_rows_of<T, DType::i8>(job, x, padded, first, last);
  } else if constexpr (sizeof(T) == 8) {
    matvec_rows_of<T, DType::f64>(job, x, padded, first, last);
  } else if (job.weight.dtype == DType::bf16) {
    matvec_rows_of<T, DType::bf16>(job, x, padded, first, last);
  } else if (job.weight.dtype == DType::f16) {
    matvec_rows_of<T, DType::f16>(job, x, padded, first, last);
  } else {
    matvec_rows_of<T, DType::f32>(job, x, padded, first, last);
  }
}

// The length of a row of x, padded to whole steps of a tile.
template <class T>
int64_t matvec_padded(int64_t K) {
  constexpr int64_t kStep = 2 * Vec<T>::W;
  return (K + kStep - 1) / kStep * kStep;
}

// Writes a row of K values of x, padded, in the order that load_pair has for this dtype.
template <class T>
void matvec_layout(const T* row, int64_t K, DType weight, T* out) {
  const int64_t W = Vec<T>::W, length = matvec_padded<T>(K);
  for (int64_t i = K; i < length; i++) out[i] = T(0);
  if (weight != DType::bf16) {
    memcpy(out, row, size_t(K) * sizeof(T));
    return;
  }
  for (int64_t step = 0; step < length; step += 2 * W)  // its even elements, then the odd ones
    for (int64_t i = 0; i < 2 * W; i++)
      out[step + i / 2 + i % 2 * W] = step + i < K ? row[step + i] : T(0);
}

template <class T>
void matvec(const MatvecJob& job, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const int64_t padded = matvec_padded<T>(job.K);
  Scratch<T> scratch(Scratch<T>::aligned(job.M * padded) + padded);
  T *const x = scratch.take(job.M * padded), *const row = scratch.take(padded);
  for (int64_t m = 0; m < job.M; m++) {
    load_row(job.x.row(m, 0, 0), job.x.dtype, job.K, row);
    matvec_layout(row, job.K, job.weight.dtype, x + m * padded);
  }
  matvec_blocks(job, x, padded, begin, end);
}
