// Working memory of one kernel call on one thread, handed out in 64-byte aligned pieces.
// Included by isa.inc inside the namespace of one instruction set.

template <class T>
class Scratch {
  static constexpr int64_t kAlign = 64 / sizeof(T);
  std::unique_ptr<T[]> memory_;
  T* next_ = nullptr;

 public:
  static int64_t aligned(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

  explicit Scratch(int64_t n) : memory_(new T[size_t(n + kAlign)]) {
    want_huge_pages(memory_.get(), size_t(n + kAlign) * sizeof(T));
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
    next_ = reinterpret_cast<T*>((address + 63) / 64 * 64);
  }

  T* begin() { return next_; }

  T* take(int64_t n) {
    T* piece = next_;
    next_ += aligned(n);
    return piece;
  }
};
