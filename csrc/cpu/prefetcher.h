// Prefetches the rows that a kernel is going to need next.
//
// The rows of one head lie far apart in memory, and hardware prefetchers do not find the next one.
// So a kernel names the rows in advance and then prefetches them one cache line at a time from its
// inner loops. (All lines at once would fill the buffers that every other access needs too.) They go
// to the second-level cache: in the first one the rows of neighbouring tokens, whose distance is often
// a power of two, would drive each other out before they are used.
// Included by isa.inc inside the namespace of one instruction set.

class Prefetcher {
  struct Rows {
    const char* row;
    int64_t stride, bytes, count;
  };
  Rows wanted_[9];  // at most r, k, v, w, grad_y and the gradients of the first four
  int next_ = 0, size_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;

 public:
  void clear() {
    next_ = size_ = 0;
    at_ = end_ = nullptr;
  }

  // Adds `count` rows of n values of a tensor, of which `row` is the first. Nothing for a null row.
  void want(const Tokens& x, const char* row, int64_t count, int64_t n) {
    if (row && count) wanted_[size_++] = {row, x.distance(1, 0), n * size_of(x.dtype), count};
  }

  RWKV6_INLINE void next_line() {
    if (at_ >= end_) {
      if (next_ == size_) return;
      Rows& rows = wanted_[next_];
      at_ = rows.row;
      end_ = at_ + rows.bytes;
      rows.row += rows.stride;
      next_ += --rows.count == 0;
    }
    __builtin_prefetch(at_, 0, 2);
    at_ += 64;
  }
};
