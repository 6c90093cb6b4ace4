// Tensors of any dtype and layout, as the C interface takes them, filled and read as float64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "rwkv6.h"

enum class DType { f64, f32, bf16, f16, i64, i32, i8 };

// Where the elements lie: one behind the other; the dimensions of a [B, T, H, N] tensor in another
// order with gaps between the rows; or every dimension but the last walked backwards.
enum class Layout { compact, strided, reversed };

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::i8: return 1;
    default: return 2;
  }
}

// The 16-bit IEEE number with that many exponent bits (bfloat16 8, float16 5) nearest to x, ties to
// even. In integers and exact products only, so that it is nobody's conversion instruction.
inline uint16_t half_of(double x, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int64_t infinity = ((int64_t(1) << exponent_bits) - 1) << mantissa_bits;
  const int64_t sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  if (std::isnan(x)) return uint16_t(sign | infinity | (int64_t(1) << (mantissa_bits - 1)));
  if (std::isinf(x)) return uint16_t(sign | infinity);
  const int exponent = x == 0 ? 1 - bias : std::max(std::ilogb(x), 1 - bias);
  const int64_t units = int64_t(std::nearbyint(std::ldexp(x, mantissa_bits - exponent)));
  const int64_t code = (int64_t(exponent + bias - 1) << mantissa_bits) + units;
  return uint16_t(sign | std::min(code, infinity));
}

inline double double_of(uint16_t half, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (half & 0x7fff) >> mantissa_bits;
  const int fraction = half & ((1 << mantissa_bits) - 1), one = 1 << mantissa_bits;
  double x = std::ldexp(exponent ? fraction + one : fraction,
                        std::max(exponent, 1) - bias - mantissa_bits);
  if (exponent == (1 << exponent_bits) - 1) x = fraction ? NAN : INFINITY;
  return half & 0x8000 ? -x : x;
}

class Tensor {
  static constexpr int64_t kMargin = 64;  // elements before the first and after the last
  static constexpr unsigned char kUnused = 0xa5;
  DType dtype_;
  bool compact_;
  std::vector<int64_t> shape_, strides_;  // in elements
  int64_t first_ = kMargin;               // where element [0, 0, ...] lies
  std::vector<unsigned char> memory_;
  DLTensor dl_ = {};

  template <class F>  // f(position in memory) for all elements in row-major order
  void for_each(const F& f) const {
    const size_t last = shape_.size() - 1;
    std::vector<int64_t> index(last, 0);
    for (int64_t n = elements(); n > 0; n -= shape_[last]) {
      int64_t row = first_;
      for (size_t d = 0; d < last; d++) row += index[d] * strides_[d];
      for (int64_t i = 0; i < shape_[last]; i++) f(row + i);
      for (size_t d = last; d-- > 0 && ++index[d] == shape_[d];) index[d] = 0;
    }
  }

  template <class T>
  T get(int64_t at) const {
    T x;
    memcpy(&x, memory_.data() + at * int64_t(sizeof x), sizeof x);
    return x;
  }
  template <class T>
  void set(int64_t at, T x) {
    memcpy(memory_.data() + at * int64_t(sizeof x), &x, sizeof x);
  }

 public:
  Tensor(DType dtype, std::vector<int64_t> shape, Layout layout = Layout::compact)
      : dtype_(dtype), compact_(layout == Layout::compact), shape_(std::move(shape)) {
    const size_t last = shape_.size() - 1;
    std::vector<size_t> order;  // of the dimensions in memory, the innermost first
    for (size_t d = shape_.size(); d-- > 0;) order.push_back(d);
    if (layout == Layout::strided && shape_.size() == 4) std::swap(order[1], order[2]);
    strides_.resize(shape_.size());
    int64_t step = 1;
    for (size_t d : order) {
      strides_[d] = step;
      step *= shape_[d];
      if (!compact_ && d == last) step += 3;  // a gap behind every row, no multiple of a vector
    }
    memory_.assign(size_t((step + 2 * kMargin) * size_of(dtype)), kUnused);
    if (layout == Layout::reversed) {
      for (size_t d = 0; d < last; d++) {
        if (shape_[d]) first_ += (shape_[d] - 1) * strides_[d];
        strides_[d] = -strides_[d];
      }
    }
  }
  Tensor(DType dtype, std::vector<int64_t> shape, Layout layout, const std::vector<double>& values)
      : Tensor(dtype, std::move(shape), layout) {
    fill(values);
  }

  DType dtype() const { return dtype_; }
  int64_t elements() const {
    int64_t n = 1;
    for (int64_t size : shape_) n *= size;
    return n;
  }

  void fill(const std::vector<double>& values) {
    const double* next = values.data();
    for_each([&](int64_t at) {
      const double x = *next++;
      switch (dtype_) {
        case DType::f64: return set(at, x);
        case DType::f32: return set(at, float(x));
        case DType::bf16: return set(at, half_of(x, 8));
        case DType::f16: return set(at, half_of(x, 5));
        case DType::i64: return set(at, int64_t(x));
        case DType::i32: return set(at, int32_t(x));
        case DType::i8: return set(at, int8_t(x));
      }
    });
  }

  std::vector<double> values() const {  // row-major
    std::vector<double> result;
    result.reserve(size_t(elements()));
    for_each([&](int64_t at) {
      switch (dtype_) {
        case DType::f64: return result.push_back(get<double>(at));
        case DType::f32: return result.push_back(double(get<float>(at)));
        case DType::bf16: return result.push_back(double_of(get<uint16_t>(at), 8));
        case DType::f16: return result.push_back(double_of(get<uint16_t>(at), 5));
        case DType::i64: return result.push_back(double(get<int64_t>(at)));
        case DType::i32: return result.push_back(double(get<int32_t>(at)));
        case DType::i8: return result.push_back(double(get<int8_t>(at)));
      }
    });
    return result;
  }

  // Bytes between, before and after the elements that somebody wrote to.
  int64_t stray_bytes() const {
    std::vector<unsigned char> rest = memory_;
    const int64_t size = size_of(dtype_);
    for_each([&](int64_t at) { std::fill_n(rest.begin() + at * size, size, kUnused); });
    return int64_t(rest.size()) - std::count(rest.begin(), rest.end(), kUnused);
  }

  bool same_bits(const Tensor& other) const { return memory_ == other.memory_; }

  DLTensor* dl() {
    const bool integer = dtype_ == DType::i64 || dtype_ == DType::i32 || dtype_ == DType::i8;
    const auto code = integer ? kDLInt : dtype_ == DType::bf16 ? kDLBfloat : kDLFloat;
    dl_.data = memory_.data();
    dl_.byte_offset = uint64_t(first_ * size_of(dtype_));
    dl_.device = {kDLCPU, 0};
    dl_.ndim = int32_t(shape_.size());
    dl_.dtype = {uint8_t(code), uint8_t(8 * size_of(dtype_)), 1};
    dl_.shape = shape_.data();
    dl_.strides = compact_ ? nullptr : strides_.data();
    return &dl_;
  }
};
