// What a segment adds to a state, for every dtype and head size: f32 in f32, f64 in f64.
//
//   S = (d_0 ... d_7) S + sum_t x_t P_t v_t
//
// for a tile of eight tokens at a time, where P_t is the product of the decays of the tokens that
// follow t. That is little more than one multiply-add for each token and element of the state; the
// recurrence takes three.
//
// A block has a square of the state, two by two packs of which are a thread's. The rows of a tile
// come through shared memory, one tile ahead, and each key's thread multiplies its x by P.
#include "cuda/decay.cuh"
#include "cuda/load.cuh"
#include "cuda/place.cuh"

namespace rwkv6::cuda {
namespace {

template <class T>
struct Shape {
  static constexpr int kPack = Pack<T>::kSize;
  static constexpr int kPacks = 16;             // of a row of the square
  static constexpr int kSide = kPacks * kPack;  // keys, and values
  static constexpr int kLanes = kPacks / 2;     // threads that share a row
  static constexpr int kThreads = kLanes * kLanes;
  static constexpr int kTile = 8;   // tokens
  static constexpr int kGroup = 4;  // of them
  static_assert(kSide <= kThreads);
};

template <class T>
struct Tile {
  typedef Pack<T> Rows[Shape<T>::kTile][Shape<T>::kPacks];
  Rows x;  // then times P
  Rows w, v;
  Pack<T> change[Shape<T>::kPacks];  // by the product of the tile's decays
};

// Which packs of N elements can be read and written at once.
struct VectorAccess {
  bool x, v, w, ends;
};

// The rows of a tensor, of a square's keys or values, in the order in which they are visited. Kept in
// shared memory: registers are for the state.
template <class T>
struct Source {
  static constexpr int kPack = Pack<T>::kSize;
  const char* first;  // nullptr: absent, reads as zeros
  int64_t distance;   // bytes from one to the next
  int count;          // elements of a row from the square's first one on
  int whole;          // packs that one copy reads, of
  int bytes;          // each
  DType dtype;

  __device__ void set(const Tokens& from, const Place& at, bool reverse, int element, int N,
                      bool vector) {
    const int64_t token = reverse ? at.last - 1 : at.first;
    const char* row = from.row(at.span.b, at.span.begin + token, at.h);
    first = row ? row + element * size_of(from.dtype) : nullptr;
    distance = reverse ? -from.distance(1, 0) : from.distance(1, 0);
    count = row ? N - element : 0;
    whole = vector ? count / kPack : 0;
    bytes = kPack * int(size_of(from.dtype));
    dtype = from.dtype;
  }
  // Starts to copy a pack of the i-th row, as it is.
  __device__ void fetch(Pack<T>* place, int64_t i, int pack) const {
    __builtin_assume(__isGlobal(first));
    const char* from = first + i * distance + pack * bytes;
    if (pack >= whole)
      fetch_pack(place, from, dtype, count - pack * kPack, false);
    else if (bytes == 16)
      cp_async<16>(place, from);
    else
      cp_async<8>(place, from);
  }
  // What fetch has brought.
  __device__ Pack<T> unpacked(const Pack<T>* place, int pack) const {
    return unpack(place, dtype, count - pack * kPack);
  }
  __device__ bool is_unpacked(int pack) const {
    return size_of(dtype) == sizeof(T) && (pack + 1) * kPack <= count;
  }
  __device__ T element(const Pack<T>* row, int i) const {
    return i < count
               ? load_element<T>(reinterpret_cast<const char*>(&row[i / kPack]), dtype, i % kPack)
               : T(0);
  }
};

template <class T>
__global__ void __launch_bounds__(Shape<T>::kThreads, kStateSumBlocks)
    state_sum_kernel(const __grid_constant__ Walk walk, const __grid_constant__ Segments segments,
                     VectorAccess vector,
                     bool uncut,    // of sequences of one segment as well
                     T* ends,       // [segment][H][N][N]
                     T* changes) {  // [segment][H][N], by the product of the segment's decays
  typedef Shape<T> Shape;
  constexpr int kPack = Shape::kPack, kTile = Shape::kTile, kGroup = Shape::kGroup,
                kPacks = Shape::kPacks;
  __shared__ Tile<T> tiles[2];
  __shared__ Place at;
  __shared__ Source<T> from_x, from_w, from_v;
  const int N = int(walk.N), sides = (N + Shape::kSide - 1) / Shape::kSide;
  const int square = int(blockIdx.x % (sides * sides));
  const int first_key = square / sides * Shape::kSide, first_value = square % sides * Shape::kSide;
  if (threadIdx.x == 0) {
    at = Place(walk.sequences, segments, walk.H, blockIdx.x / (sides * sides));
    from_x.set(walk.x, at, walk.reverse, first_key, N, vector.x);
    from_w.set(walk.w, at, walk.reverse, first_key, N, vector.w);
    from_v.set(walk.v, at, walk.reverse, first_value, N, vector.v);
  }
  __syncthreads();
  if (!at.span.valid || at.is_left_over() || !(at.cut || uncut)) return;

  const int64_t length = at.last - at.first;
  // Without a gradient of the final state the last token's decay does not matter, be it NaN.
  const bool first_decays = !walk.reverse || walk.from.data || !at.is_end();
  const int row_pack = threadIdx.x % kPacks, row_token = threadIdx.x / kPacks;
  constexpr int kRowTokens = Shape::kThreads / kPacks;
  const auto fetch = [&](int64_t begin) {
    Tile<T>& to = tiles[begin / kTile % 2];
#pragma unroll 1
    for (int t = row_token; t < kTile && begin + t < length; t += kRowTokens) {
      from_x.fetch(&to.x[t][row_pack], begin + t, row_pack);
      from_w.fetch(&to.w[t][row_pack], begin + t, row_pack);
      from_v.fetch(&to.v[t][row_pack], begin + t, row_pack);
    }
    cp_async_commit();
  };
  fetch(0);

  const int key_lane = threadIdx.x / Shape::kLanes, value_lane = threadIdx.x % Shape::kLanes;
  T sum[2][kPack][2][kPack] = {};
  const int own = threadIdx.x;  // key
  T all_change = T(-0.);        // by the product of the segment's decays
  for (int64_t begin = 0; begin < length; begin += kTile) {
    Tile<T>& rows = tiles[begin / kTile % 2];
    const int tokens = int(min(length - begin, int64_t(kTile)));
    cp_async_wait<0>();
#pragma unroll
    for (int t = row_token; t < kTile; t += kRowTokens) {
      Pack<T>& v = rows.v[t][row_pack];
      if (t >= tokens)
        v = zeros<T>();
      else if (!from_v.is_unpacked(row_pack))
        v = from_v.unpacked(&v, row_pack);
    }
    __syncthreads();  // the tile is there, and nobody needs the one before
    if (begin + kTile < length) fetch(begin + kTile);
    if (own < Shape::kSide) {
      T x[kTile], m[kTile];
#pragma unroll
      for (int t = 0; t < kTile; t++) {
        x[t] = t < tokens ? from_x.element(rows.x[t], own) : T(0);
        m[t] = t < tokens ? change_of_rate(decay_rate(from_w.element(rows.w[t], own))) : T(-0.);
      }
      if (begin == 0 && !first_decays) m[0] = T(-0.);
      __syncwarp();               // everybody has read what was there
      T product = 1, change = 0;  // as long as it is large, the product - 1
#pragma unroll
      for (int t = kTile - 1; t >= 0; t--) {
        rows.x[t][own / kPack].x[own % kPack] = product * x[t];
        product *= kept_of(m[t]) + m[t];
        change += m[t] * change + m[t];
      }
      change = product < T(0.5) ? product : -fabs(change);  // see decay.cuh
      rows.change[own / kPack].x[own % kPack] = change;
      all_change = change_of_product(all_change, change);
    }
    __syncthreads();
    // A few tokens are added up before they meet the state, so that few sums are rounded to its size.
    const auto add = [&](auto packs) {
      constexpr int kEach = decltype(packs)::value;
#pragma unroll
      for (int t = 0; t < kTile; t += kGroup) {
        Pack<T> v[kGroup][kEach];
#pragma unroll
        for (int g = 0; g < kGroup; g++)
#pragma unroll
          for (int q = 0; q < kEach; q++) v[g][q] = rows.v[t + g][value_lane + q * Shape::kLanes];
#pragma unroll
        for (int p = 0; p < kEach; p++) {
          const int pack = key_lane + p * Shape::kLanes;
          Pack<T> x[kGroup];
#pragma unroll
          for (int g = 0; g < kGroup; g++) x[g] = rows.x[t + g][pack];
          const Pack<T> m = rows.change[pack];
#pragma unroll
          for (int e = 0; e < kPack; e++)
#pragma unroll
            for (int q = 0; q < kEach; q++)
#pragma unroll
              for (int c = 0; c < kPack; c++) {
                T& s = sum[p][e][q][c];
                T added = x[0].x[e] * v[0][q].x[c];
#pragma unroll
                for (int g = 1; g < kGroup; g++) added += x[g].x[e] * v[g][q].x[c];
                s = t == 0 ? kept_of(m.x[e]) * s + (m.x[e] * s + added) : s + added;
              }
        }
      }
    };
    if (2 * N <= Shape::kSide)  // then the other packs are empty
      add(std::integral_constant<int, 1>());
    else
      add(std::integral_constant<int, 2>());
  }

  constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;
#pragma unroll
  for (int p = 0; p < 2; p++)
#pragma unroll
    for (int e = 0; e < kPack; e++) {
      const int i = first_key + (key_lane + p * Shape::kLanes) * kPack + e;
#pragma unroll
      for (int q = 0; q < 2; q++) {
        const int j = first_value + (value_lane + q * Shape::kLanes) * kPack;
        Pack<T> values;
#pragma unroll
        for (int c = 0; c < kPack; c++) values.x[c] = sum[p][e][q][c];
        if (i < N)
          store_pack(reinterpret_cast<char*>(ends + (at.index * N + i) * N + j), kDType, values,
                     N - j, vector.ends);
      }
    }
  if (own < Shape::kSide && first_key + own < N && first_value == 0)
    changes[at.index * N + first_key + own] = all_change;
}

}  // namespace

template <class T>
int64_t state_sum_squares(int64_t N) {
  const int64_t sides = (N + Shape<T>::kSide - 1) / Shape<T>::kSide;
  return sides * sides;
}

template <class T>
void state_sums(const Launch& launch, const Walk& walk, const Segments& segments, bool uncut,
                T* ends, T* changes) {
  const VectorAccess vector = {has_vector_rows<T>(walk.x), has_vector_rows<T>(walk.v),
                               has_vector_rows<T>(walk.w), walk.N % Pack<T>::kSize == 0};
  const Kernel kernel = {"state_sum", state_sum_kernel<T>, Shape<T>::kThreads, 0};
  kernel.run(launch, segments.count * walk.H * state_sum_squares<T>(walk.N), walk, segments, vector,
             uncut, ends, changes);
}

template int64_t state_sum_squares<float>(int64_t);
template int64_t state_sum_squares<double>(int64_t);
template void state_sums(const Launch&, const Walk&, const Segments&, bool, float*, float*);
template void state_sums(const Launch&, const Walk&, const Segments&, bool, double*, double*);

}  // namespace rwkv6::cuda
