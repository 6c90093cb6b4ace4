// Rows of a head are far apart in memory, where no hardware prefetcher finds the next one: the
// kernels name those that they will want, and then fetch them a line at a time from within their
// inner loops. (All at once they would fill the buffers that every other access needs.)
// Included by isa.inc inside the namespace of one instruction set.

class Fetch {
  struct Rows {
    const char* row;
    int64_t stride, bytes, count;
  };
  Rows wanted_[9];  // r, k, v, w, dy and the gradients of the first four
  int next_ = 0, size_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;

 public:
  void clear() {
    next_ = size_ = 0;
    at_ = end_ = nullptr;
  }

  // `count` rows of n values of a tensor, from a row on. A null row is none.
  void want(const Tokens& x, const char* row, int64_t count, int64_t n) {
    if (row && count) wanted_[size_++] = {row, x.distance(1, 0), n * size_of(x.dtype), count};
  }

  RWKV6_INLINE void line() {
    if (at_ >= end_) {
      if (next_ == size_) return;
      Rows& rows = wanted_[next_];
      at_ = rows.row;
      end_ = at_ + rows.bytes;
      rows.row += rows.stride;
      next_ += --rows.count == 0;
    }
    __builtin_prefetch(at_);
    at_ += 64;
  }
};
