#include "arguments.h"

#include <initializer_list>

#include "overlap.h"

namespace rwkv6 {
namespace {

std::string text_of(const std::string& text) { return text; }
std::string text_of(int64_t number) { return std::to_string(number); }

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw ArgumentError((text_of(parts) + ...));
}

std::string shape_text(const int64_t* shape, int ndim) {
  std::string text = "[";
  for (int i = 0; i < ndim; i++) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return "float64";
    case DType::f32: return "float32";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    default: return "int8";
  }
}

// The argument whose rows the sequences start from.
const char* state_name(bool in_place) { return in_place ? "state" : "initial_state"; }

int64_t stride(const DLTensor* x, int dim) {
  if (x->strides) return x->strides[dim];
  int64_t step = 1;  // no strides means compact and row-major
  for (int i = dim + 1; i < x->ndim; i++) step *= x->shape[i];
  return step;
}

char* data(const DLTensor* x) { return static_cast<char*>(x->data) + x->byte_offset; }

int64_t elements(const DLTensor* x) {
  int64_t n = 1;
  for (int i = 0; i < x->ndim; i++) n *= x->shape[i];
  return n;
}

// The addresses of the first byte of a tensor's elements and of the byte after the last.
std::pair<intptr_t, intptr_t> bounds(const DLTensor* x) {
  const intptr_t size = x->dtype.bits / 8, at = reinterpret_cast<intptr_t>(data(x));
  if (!elements(x)) return {at, at};
  intptr_t before = 0, behind = size;
  for (int i = 0; i < x->ndim; i++) {
    const intptr_t distance = (x->shape[i] - 1) * stride(x, i) * size;
    (distance < 0 ? before : behind) += distance;
  }
  return {at + before, at + behind};
}

std::vector<Dimension> dimensions(const DLTensor* x) {
  std::vector<Dimension> dims;
  for (int i = 0; i < x->ndim; i++) dims.push_back({stride(x, i), x->shape[i]});
  return dims;
}

Extent extent(const DLTensor* x) {
  Extent memory = {int64_t(reinterpret_cast<intptr_t>(data(x))), x->dtype.bits / 8, dimensions(x)};
  for (Dimension& d : memory.dims) d.stride *= memory.element;
  return memory;
}

Device device_of(const char* name, const DLTensor* x) {
  switch (x->device.device_type) {
    case kDLCPU:
    case kDLCUDAHost: return {};
    case kDLCUDA: return {true, x->device.device_id};
    default:
      fail(name, ": expected a tensor on the CPU or a CUDA device, got DLPack device type ",
           int(x->device.device_type));
  }
}

std::string text_of(Device device) {
  return device.cuda ? "CUDA device " + std::to_string(device.index) : "the CPU";
}

// Shape, device and memory of any tensor; -1 in `shape` stands for any size.
void check(const char* name, const DLTensor* x, std::initializer_list<int64_t> shape,
           Device device) {
  if (!x) fail(name, ": required, got NULL");
  bool fits = x->ndim == int(shape.size());
  for (int i = 0; fits && i < x->ndim; i++) {
    const int64_t expected = shape.begin()[i];
    fits = expected < 0 ? x->shape[i] >= 0 : x->shape[i] == expected;
  }
  if (!fits)
    fail(name, ": expected shape ", shape_text(shape.begin(), int(shape.size())),
         " (-1: any), got ", shape_text(x->shape, x->ndim));
  const Device found = device_of(name, x);
  if (found != device)
    fail(name, ": expected a tensor on ", text_of(device), ", got one on ", text_of(found));
  if (elements(x) && !x->data) fail(name, ": its data pointer is NULL");
}

void check_last_contiguous(const char* name, const DLTensor* x) {
  const int last = x->ndim - 1;
  if (x->shape[last] > 1 && stride(x, last) != 1 && elements(x))
    fail(name, ": the last dimension must be contiguous, got stride ", stride(x, last));
}

// The same for a float tensor: also dtype and a contiguous last dimension.
DType check_float(const char* name, const DLTensor* x, std::initializer_list<int64_t> shape,
                  Device device, DType dtype, DType or_dtype) {
  check(name, x, shape, device);
  const DType found = dtype_of(name, x);
  if (found != dtype && found != or_dtype)
    fail(name, ": expected ", name_of(dtype), dtype == or_dtype ? "" : " or ",
         dtype == or_dtype ? "" : name_of(or_dtype), ", got ", name_of(found));
  check_last_contiguous(name, x);
  return found;
}

// The same for a tensor of int8.
void check_int8(const char* name, const DLTensor* x, std::initializer_list<int64_t> shape) {
  check(name, x, shape, Device());
  const DLDataType dtype = x->dtype;
  if (dtype.code != kDLInt || dtype.lanes != 1 || dtype.bits != 8) fail(name, ": expected int8");
  check_last_contiguous(name, x);
}

// An index tensor as it lies in memory; absent for NULL.
Indices indices(const DLTensor* x) {
  return x ? Indices{data(x), x->dtype.bits == 64, stride(x, 0)} : Indices();
}

// A 1-D int32 or int64 tensor; size = -1 takes any.
void check_indices(const char* name, const DLTensor* x, int64_t size, Device device) {
  check(name, x, {size}, device);
  const DLDataType dtype = x->dtype;
  if (dtype.code != kDLInt || dtype.lanes != 1 || (dtype.bits != 32 && dtype.bits != 64))
    fail(name, ": expected int32 or int64");
}

}  // namespace

DType dtype_of(const char* name, const DLTensor* x) {
  if (!x) fail(name, ": required, got NULL");
  const DLDataType dtype = x->dtype;
  if (dtype.lanes == 1) {
    if (dtype.code == kDLFloat && dtype.bits == 64) return DType::f64;
    if (dtype.code == kDLFloat && dtype.bits == 32) return DType::f32;
    if (dtype.code == kDLFloat && dtype.bits == 16) return DType::f16;
    if (dtype.code == kDLBfloat && dtype.bits == 16) return DType::bf16;
  }
  fail(name, ": expected float64, float32, bfloat16 or float16, got DLPack dtype code ",
       int(dtype.code), " of ", int(dtype.bits), " bits");
}

int64_t dimension_size(const char* name, const DLTensor* x, int dim) {
  if (!x) fail(name, ": required, got NULL");
  if (x->ndim < 1) fail(name, ": expected a matrix, got a number");
  return x->shape[dim < 0 ? x->ndim + dim : dim];
}

Sizes check_first(const char* name, const DLTensor* x) {
  const DType dtype = dtype_of(name, x);
  const Device device = device_of(name, x);
  check_float(name, x, {-1, -1, -1, -1}, device, dtype, dtype);
  const Sizes sizes{x->shape[0], x->shape[1], x->shape[2], x->shape[3], device};
  if (sizes.N < 1 || sizes.N > kMaxHeadSize)
    fail(name, ": expected a head size N from 1 to ", kMaxHeadSize, ", got ", sizes.N);
  return sizes;
}

Tokens tokens(const char* name, const DLTensor* x, const Sizes& sizes, DType dtype,
              DType or_dtype) {
  const DType found =
      check_float(name, x, {sizes.B, sizes.T, sizes.H, sizes.N}, sizes.device, dtype, or_dtype);
  return {data(x), found, stride(x, 0), stride(x, 1), stride(x, 2)};
}

Heads heads(const char* name, const DLTensor* x, const Sizes& sizes, DType dtype, DType or_dtype) {
  const auto [B, T, H, N, device] = sizes;
  if (!x || x->ndim != 3) {
    const DType found = check_float(name, x, {H, N}, device, dtype, or_dtype);
    return {data(x), found, stride(x, 0)};
  }
  const DType found = check_float(name, x, {B, H, N}, device, dtype, or_dtype);
  // 0 would mean that batch rows share one [H, N], of which an empty batch has none
  const int64_t stride_b = B == 0 ? 1 : B == 1 ? 0 : stride(x, 0);
  return {data(x), found, stride(x, 1), stride_b};
}

States states(const char* name, const DLTensor* x, int64_t rows, const Sizes& sizes, DType dtype,
              DType or_dtype) {
  const DType found =
      check_float(name, x, {rows, sizes.H, sizes.N, sizes.N}, sizes.device, dtype, or_dtype);
  return {data(x), found, stride(x, 0), stride(x, 1), stride(x, 2)};
}

Sizes check_channels(const char* name, const DLTensor* x) {
  const DType dtype = dtype_of(name, x);
  check_float(name, x, {-1, -1, -1}, Device(), dtype, dtype);
  return {x->shape[0], x->shape[1], 1, x->shape[2], Device()};
}

Tokens channel_tokens(const char* name, const DLTensor* x, const Sizes& sizes, DType dtype) {
  check_float(name, x, {sizes.B, sizes.T, sizes.N}, sizes.device, dtype, dtype);
  return {data(x), dtype, stride(x, 0), stride(x, 1), 0};
}

Heads channel_vector(const char* name, const DLTensor* x, const Sizes& sizes, DType dtype,
                     DType or_dtype) {
  const DType found = check_float(name, x, {sizes.N}, sizes.device, dtype, or_dtype);
  return {data(x), found, 0};
}

States channel_states(const char* name, const DLTensor* x, const Sizes& sizes, DType dtype) {
  check_float(name, x, {sizes.B, 3, sizes.N}, sizes.device, dtype, dtype);
  return {data(x), dtype, stride(x, 0), stride(x, 1), 0};
}

Tokens matrix(const char* name, const DLTensor* x, int64_t rows, int64_t columns, DType dtype) {
  check_float(name, x, {rows, columns}, Device(), dtype, dtype);
  return {data(x), dtype, stride(x, 0), 0, 0};
}

Tokens int8_matrix(const char* name, const DLTensor* x, int64_t rows, int64_t columns) {
  check_int8(name, x, {rows, columns});
  return {data(x), DType::i8, stride(x, 0), 0, 0};
}

const float* row_scales(const char* name, const DLTensor* x, int64_t rows) {
  check_float(name, x, {rows}, Device(), DType::f32, DType::f32);
  return reinterpret_cast<const float*>(data(x));
}

const char* parameter(const char* name, const DLTensor* x, std::initializer_list<int64_t> shape,
                      DType dtype) {
  if (!x) fail(name, ": required, got NULL");
  DLTensor inner = *x;
  while (inner.ndim > int(shape.size()) && *inner.shape == 1) {
    inner.ndim--, inner.shape++;
    if (inner.strides) inner.strides++;
  }
  if (dtype == DType::i8)
    check_int8(name, &inner, shape);
  else
    check_float(name, &inner, shape, Device(), dtype, dtype);
  int64_t step = 1;
  for (int i = inner.ndim - 1; i >= 0; step *= inner.shape[i], i--)
    if (inner.shape[i] > 1 && stride(&inner, i) != step && elements(x))
      fail(name, ": must be dense, got stride ", stride(&inner, i), " in dimension ", i);
  return data(x);
}

void check_writable(const char* name, const DLTensor* x) {
  if (overlaps_itself(dimensions(x)))
    fail(name, ": it is written to, but its elements overlap in memory (an expanded view?)");
}

void check_apart(const char* name, const DLTensor* x, const char* input_name,
                 const DLTensor* input) {
  const auto [begin, end] = bounds(x);
  const auto [input_begin, input_end] = bounds(input);
  if (begin >= input_end || input_begin >= end) return;  // the usual case, at no cost
  if (overlap(extent(x), extent(input)))
    fail(name, ": it is updated in place, but shares memory with ", input_name);
}

Sequences check_sequences(const Sizes& sizes, const DLTensor* state_map, const DLTensor* cu_seqlens,
                          const DLTensor* state, bool in_place) {
  const int64_t states = state ? state->shape[0] : 0;
  int64_t count = sizes.B;
  if (cu_seqlens) {
    if (sizes.B != 1) fail("cu_seqlens: packed sequences need B = 1, got B = ", sizes.B);
    check_indices("cu_seqlens", cu_seqlens, -1, sizes.device);
    count = cu_seqlens->shape[0] - 1;
    if (count < 0) fail("cu_seqlens: expected at least one offset (M + 1 of them), got none");
  }
  if (!state) {
    if (state_map) fail("state_map: given without initial_state, which it would index");
  } else if (state_map) {
    check_indices("state_map", state_map, count, sizes.device);
  } else if (states != count && (states != 1 || in_place)) {
    fail(state_name(in_place), ": ", states, " rows for ", count, " sequences need a state_map");
  }
  if (cu_seqlens && count == 0 && sizes.T)
    fail("cu_seqlens: no sequence for T = ", sizes.T, " tokens");
  return {count, sizes.T, states, indices(state_map), indices(cu_seqlens), in_place, nullptr};
}

std::vector<Sequence> read_sequences(const Sequences& sequences) {
  const auto& [count, T, states, map, offsets, in_place, unused] = sequences;
  std::vector<Sequence> result;
  if (offsets.data && offsets[0] != 0) fail("cu_seqlens: the first must be 0, got ", offsets[0]);
  if (offsets.data && offsets[count] != T)
    fail("cu_seqlens: the last must be T = ", T, ", got ", offsets[count]);
  std::vector<bool> taken(size_t(states), false);
  for (int64_t m = 0; m < count; m++) {
    Sequence sequence = {m, 0, T, -1, m};
    if (offsets.data) {
      const int64_t begin = offsets[m], end = offsets[m + 1];
      if (end < begin)
        fail("cu_seqlens: must not fall, but entry ", m + 1, " is ", end, " after ", begin);
      sequence = {0, begin, end - begin, -1, m};
    }
    if (states || map.data) {
      const int64_t row = map.data ? map[m] : states == 1 ? 0 : m;
      const bool padding = in_place && row < 0;
      if (!padding && (row < 0 || row >= states))
        fail("state_map: entry ", m, " is ", row, ", expected 0 to ", states - 1, " (", states,
             " rows of ", state_name(in_place), ")");
      sequence.initial = padding ? -1 : row;
    }
    if (in_place) {
      const int64_t row = sequence.final = sequence.initial;
      if (row >= 0 && taken[size_t(row)])
        fail("state_map: two sequences cannot update row ", row, " of state in place");
      if (row >= 0) taken[size_t(row)] = true;
    }
    result.push_back(sequence);
  }
  return result;
}

}  // namespace rwkv6
