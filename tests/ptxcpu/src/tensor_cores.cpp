// mma.sync and wmma. NVIDIA does not document how tensor cores round. mma.sync does here what Fasi,
// Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores" (2021), found on an A100:
// exact products are aligned with the largest addend, cut to one bit more than a float has, summed,
// and the sum is cut to a float. wmma sums in double and rounds once.
#include "statement.h"

namespace ptxcpu {
namespace {

float element(Type type, uint32_t two, int which) {
  uint16_t one = uint16_t(two >> 16 * which);
  return type == Type::kF16 ? from_half(one) : from_bfloat16(one);
}

void set_half(uint32_t& two, int which, double value) {
  uint32_t one = to_half(value);
  two = which ? (two & 0xffff) | one << 16 : (two & 0xffff0000) | one;
}

// c[j] + the sum over k < K of a[k] b[k][j], for N columns; magnitudes are cut, not rounded.
template <int K, int N>
void add_products(const float* a, const float (*b)[N], double* c) {
  double products[K][N], unit[N], sum[N];
  uint64_t largest[N];
  constexpr uint64_t kMagnitude = ~uint64_t(0) >> 1, kExponent = uint64_t(0x7ff) << 52;
  for (int j = 0; j < N; j++) largest[j] = bits<uint64_t>(c[j]) & kMagnitude;
  for (int k = 0; k < K; k++) {
    for (int j = 0; j < N; j++) {
      products[k][j] = double(a[k]) * b[k][j];
      largest[j] = std::max(largest[j], bits<uint64_t>(products[k][j]) & kMagnitude);
    }
  }
  for (int j = 0; j < N; j++) {  // a float has 23 bits behind its first
    unit[j] = std::max(bits<double>(largest[j] & kExponent) * 0x1p-24, 0x1p-1000);
    sum[j] = std::trunc(c[j] / unit[j]);
  }
  for (int k = 0; k < K; k++) {
    for (int j = 0; j < N; j++) sum[j] += std::trunc(products[k][j] / unit[j]);
  }
  for (int j = 0; j < N; j++) {
    sum[j] *= unit[j];
    double cut = bits<double>(bits<uint64_t>(sum[j]) & ~uint64_t(0x1fffffff));
    double special = c[j];  // with a NaN or an infinity no unit is right
    for (int k = 0; k < K; k++) special += products[k][j];
    c[j] = largest[j] < kExponent ? cut : special;
  }
}

// c[M][N] += a[M][K] b[K][N]
void multiply(const float* a, const float* b, double* c, int M, int N, int K) {
  for (int i = 0; i < M; i++) {
    for (int k = 0; k < K; k++) {
      double factor = a[i * K + k];
      for (int j = 0; j < N; j++) c[i * N + j] += factor * b[k * N + j];
    }
  }
}

// mma.sync.aligned.m16n8kK.row.col: lane 4 g + q holds of
//   A: rows g and g + 8; B: column g; C: rows g and g + 8, columns 2 q and 2 q + 1
//   16 bits: columns of A, rows of B 2 q + (0, 1) + (0, 8); TF32: q + (0, 4)
template <int K>
void mma_sync(Statement& s) {
  constexpr int M = 16, N = 8;
  Type factors = s.type(1);
  bool float_in = s.type(3) == Type::kF32, float_out = s.type(0) == Type::kF32;
  auto a = s.all_in<uint32_t>(1), b = s.all_in<uint32_t>(2);
  auto c = s.all_in<uint32_t>(3), d = s.all_out<uint32_t>(0);
  int per_register = factors == Type::kTF32 ? 1 : 2;
  if (a.size() != size_t(M * K / kLanes / per_register) || b.size() * 2 != a.size() ||
      c.size() != (float_in ? 4 : 2) || d.size() != (float_out ? 4 : 2)) {
    s.unsupported();
  }
  s.emit([=](Warp& warp, Mask mask) {
    warp.require_whole(mask, "mma");
    float A[M][K], B[K][N];
    double C[M][N];
    for (size_t i = 0; i < a.size(); i++) {
      const uint32_t* from = a[i](warp);
      int row = i & 1 ? 8 : 0;
      for (int lane = 0; lane < kLanes; lane++) {
        int g = lane / 4, q = lane % 4;
        if (factors == Type::kTF32) {
          A[g + row][q + 4 * (i >> 1)] = as_tf32(from[lane]);
        } else {
          A[g + row][2 * q + 8 * (i >> 1)] = element(factors, from[lane], 0);
          A[g + row][2 * q + 1 + 8 * (i >> 1)] = element(factors, from[lane], 1);
        }
      }
    }
    for (size_t i = 0; i < b.size(); i++) {
      const uint32_t* from = b[i](warp);
      for (int lane = 0; lane < kLanes; lane++) {
        int g = lane / 4, q = lane % 4;
        if (factors == Type::kTF32) {
          B[q + 4 * i][g] = as_tf32(from[lane]);
        } else {
          B[2 * q + 8 * i][g] = element(factors, from[lane], 0);
          B[2 * q + 1 + 8 * i][g] = element(factors, from[lane], 1);
        }
      }
    }
    for (int i = 0; i < 4; i++) {
      const uint32_t* from = c[float_in ? i : i / 2](warp);
      for (int lane = 0; lane < kLanes; lane++) {
        C[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] =
            float_in ? bits<float>(from[lane]) : element(Type::kF16, from[lane], i & 1);
      }
    }
    constexpr int kAtOnce = 4;  // of TF32; of 16 bits 8
    for (int i = 0; i < M; i++) {
      if (factors == Type::kTF32) {
        for (int k = 0; k < K; k += kAtOnce) add_products<kAtOnce>(A[i] + k, B + k, C[i]);
      } else if constexpr (K >= 8) {
        for (int k = 0; k < K; k += 8) add_products<8>(A[i] + k, B + k, C[i]);
      }
    }
    for (int i = 0; i < 4; i++) {
      uint32_t* to = d[float_out ? i : i / 2](warp);
      for (int lane = 0; lane < kLanes; lane++) {
        double value = C[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
        if (float_out) {
          to[lane] = bits<uint32_t>(canonical_nan(float(value)));
        } else {
          set_half(to[lane], i & 1, value);
        }
      }
    }
    warp.launch->statistics.mma_flops += 2 * M * N * K;
  });
}

void mma(Statement& s) {
  if (!s.has("row") || !s.has("col") || s.types() != 4) s.unsupported();
  Type factors = s.type(1);
  if (factors != Type::kF16 && factors != Type::kBF16 && factors != Type::kTF32) s.unsupported();
  if (s.has("m16n8k16")) return mma_sync<16>(s);
  if (s.has("m16n8k8")) return mma_sync<8>(s);
  if (s.has("m16n8k4") && factors == Type::kTF32) return mma_sync<4>(s);
  s.unsupported();
}

// ---- wmma: fragments in an order of our own, which programs may not rely on: lane l holds the
// elements from l times the number per lane on of the matrix in row-major order. ----

struct Shape {
  int M = 0, N = 0, K = 0;
};

Shape shape(Statement& s) {
  Shape shape;
  for (const std::string& modifier : s.modifiers) {
    if (sscanf(modifier.c_str(), "m%dn%dk%d", &shape.M, &shape.N, &shape.K) == 3) return shape;
  }
  s.unsupported();
}

bool is_float32(Type type) { return type == Type::kF32 || type == Type::kTF32; }

// A fragment's matrix in memory.
struct Tile {
  int rows, columns;
  bool column_major;
  Type type;
  Address address;
  Register<uint32_t> stride;  // in elements; none given: that of a dense matrix
  uint32_t bytes() const { return is_float32(type) ? 4 : 2; }
  int per_lane() const { return rows * columns / kLanes; }
};

Tile tile(Statement& s, int address) {
  Shape mnk = shape(s);
  bool is_a = s.has("a"), is_b = s.has("b");
  Tile tile = {
      is_b ? mnk.K : mnk.M, is_a ? mnk.K : mnk.N, s.has("col"), s.type(), s.address(address), {}};
  if (s.operands.size() > 2) tile.stride = s.in<uint32_t>(2);
  return tile;
}

// f(lane, element of the lane, its place) for what may be accessed.
template <class F>
void for_elements(Warp& warp, Mask mask, const Tile& tile, Use use, F f) {
  warp.require_whole(mask, "wmma");
  Block& block = *warp.block;
  const Options& options = warp.launch->configuration.options;
  uint64_t addresses[kLanes];
  tile.address.read(warp, addresses);
  uint64_t base = addresses[0];
  bool shared = tile.address.space == Space::kShared;
  if (tile.address.space == Space::kGeneric && block.owns_shared(base)) {
    shared = true;
    base -= uint64_t(block.shared);
  }
  uint32_t stride = tile.stride.offset == kNoRegister
                        ? uint32_t(tile.column_major ? tile.rows : tile.columns)
                        : tile.stride(warp)[0];
  uint32_t bytes = tile.bytes();
  if (base % 16) warp.report("wmma: the pointer is not 16-byte aligned");
  if (stride * bytes % 16) warp.report("wmma: the stride is not a multiple of 16 bytes");
  const char* what = use == Use::kLoad ? "load of wmma" : "store of wmma";
  for (int i = 0; i < tile.per_lane(); i++) {
    uint64_t places[kLanes];
    Mask good = 0;
    for (int lane = 0; lane < kLanes; lane++) {
      int index = lane * tile.per_lane() + i;
      uint64_t row = index / tile.columns, column = index % tile.columns;
      uint64_t offset = (tile.column_major ? column * stride + row : row * stride + column) * bytes;
      places[lane] = base + offset;
      if (shared ? !check_shared(warp, places[lane], bytes, bytes, what)
                 : !check_global(warp, places[lane], bytes, bytes, what)) {
        continue;
      }
      good |= 1u << lane;
      uint64_t place = shared ? uint64_t(block.shared) + places[lane] : places[lane];
      if (shared && options.check && use == Use::kLoad) {
        block.checks.read(warp, lane, uint32_t(places[lane]), bytes);
      } else if (shared && options.check) {
        block.checks.write(warp, lane, uint32_t(places[lane]), bytes);
      }
      f(lane, i, reinterpret_cast<uint8_t*>(place));
    }
    if (!shared && options.statistics && good) {
      count_global(warp, places, bytes, good, use == Use::kStore);
    }
  }
}

void wmma_load(Statement& s) {
  auto to = s.all_out<uint32_t>(0);
  Tile from = tile(s, 1);
  s.emit([=](Warp& warp, Mask mask) {
    int per_lane = from.per_lane();
    for_elements(warp, mask, from, Use::kLoad, [&](int lane, int i, const uint8_t* place) {
      uint32_t value = 0;
      memcpy(&value, place, from.bytes());
      if (is_float32(from.type)) {
        to[i](warp)[lane] = value;
        return;
      }
      // fragments of 16-bit factors have more registers than they need: the rest are copies
      for (size_t r = i / 2; r < to.size(); r += per_lane / 2) {
        uint32_t& two = to[r](warp)[lane];
        two = i & 1 ? (two & 0xffff) | value << 16 : (two & 0xffff0000) | value;
      }
    });
  });
}

void wmma_store(Statement& s) {
  auto from = s.all_in<uint32_t>(1);
  Tile to = tile(s, 0);
  s.emit([=](Warp& warp, Mask mask) {
    for_elements(warp, mask, to, Use::kStore, [&](int lane, int i, uint8_t* place) {
      uint32_t value =
          is_float32(to.type) ? from[i](warp)[lane] : from[i / 2](warp)[lane] >> (i & 1 ? 16 : 0);
      memcpy(place, &value, to.bytes());
    });
  });
}

void wmma_mma(Statement& s) {
  Shape mnk = shape(s);
  Type factors = s.types() >= 4 ? s.type(1) : Type::kF16;
  Type result = s.type(0), addend = s.type(-1);
  auto a = s.all_in<uint32_t>(1), b = s.all_in<uint32_t>(2);
  auto c = s.all_in<uint32_t>(3), d = s.all_out<uint32_t>(0);
  s.emit([=](Warp& warp, Mask mask) {
    warp.require_whole(mask, "wmma.mma");
    auto [M, N, K] = mnk;
    auto read = [&](const std::vector<Register<uint32_t>>& from, Type type, int size) {
      std::vector<float> elements(size);
      int per_lane = size / kLanes;
      for (int i = 0; i < size; i++) {
        int lane = i / per_lane, which = i % per_lane;
        elements[i] = type == Type::kF32    ? bits<float>(from[which](warp)[lane])
                      : type == Type::kTF32 ? as_tf32(from[which](warp)[lane])
                                            : element(type, from[which / 2](warp)[lane], which & 1);
      }
      return elements;
    };
    std::vector<float> A = read(a, factors, M * K), B = read(b, factors, K * N);
    std::vector<float> addends = read(c, addend, M * N);
    std::vector<double> C(addends.begin(), addends.end());
    multiply(A.data(), B.data(), C.data(), M, N, K);
    int per_lane = M * N / kLanes;
    for (int i = 0; i < M * N; i++) {
      int lane = i / per_lane, which = i % per_lane;
      if (result == Type::kF32) {
        d[which](warp)[lane] = bits<uint32_t>(canonical_nan(float(C[i])));
      } else {
        set_half(d[which / 2](warp)[lane], which & 1, C[i]);
      }
    }
    warp.launch->statistics.mma_flops += 2ull * M * N * K;
  });
}

void wmma(Statement& s) {
  if (s.has("load")) return wmma_load(s);
  if (s.has("store")) return wmma_store(s);
  wmma_mma(s);
}

}  // namespace

void add_tensor_cores(Decoders& decoders) {
  decoders["mma"] = mma;
  decoders["wmma"] = wmma;
}

}  // namespace ptxcpu
