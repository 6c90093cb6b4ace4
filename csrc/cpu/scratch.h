// The working memory of one kernel call on one thread: one allocation, from which pieces aligned to
// 64 bytes are taken.
// Included by isa.inc inside the namespace of one instruction set.

template <class T>
class Scratch {
  static constexpr int64_t kAlign = 64 / sizeof(T);
#ifdef RWKV6_ADDRESS_SANITIZER
  // Under AddressSanitizer the pieces have gaps between them that must not be touched, so that an
  // overrun of one piece is found although all are one allocation.
  static constexpr int64_t kGap = kAlign, kMostPieces = 64;
#else
  static constexpr int64_t kGap = 0, kMostPieces = 0;
#endif
  std::unique_ptr<T[]> memory_;
  T* next_ = nullptr;

 public:
  static int64_t aligned(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

  explicit Scratch(int64_t n) {
    const int64_t size = n + kAlign + kMostPieces * kGap;
    memory_.reset(new T[size_t(size)]);
    want_huge_pages(memory_.get(), size_t(size) * sizeof(T));
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
    next_ = reinterpret_cast<T*>((address + 63) / 64 * 64);
#ifdef RWKV6_ADDRESS_SANITIZER
    ASAN_POISON_MEMORY_REGION(memory_.get(), size_t(size) * sizeof(T));
#endif
  }

  T* take(int64_t n) {
    T* piece = next_;
    next_ += aligned(n) + kGap;
#ifdef RWKV6_ADDRESS_SANITIZER
    ASAN_UNPOISON_MEMORY_REGION(piece, size_t(aligned(n)) * sizeof(T));
#endif
    return piece;
  }
};
