// Treats denormal numbers as zero while it lives, on this thread only. A dying state would
// otherwise spend its last steps in numbers that cost a hundred times more to compute with.
// Included by isa.inc inside the namespace of one instruction set.

class FlushDenormals {
#if defined(__x86_64__)
  const unsigned saved_ = _mm_getcsr();

 public:
  FlushDenormals() { _mm_setcsr(saved_ | 0x8040); }  // flush to zero, denormals are zero
  ~FlushDenormals() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  uint64_t saved_;

 public:
  FlushDenormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    const uint64_t flush = saved_ | (uint64_t(1) << 24);
    // "memory": arithmetic on what is loaded and stored in between stays in between
    __asm__ volatile("msr fpcr, %0" : : "r"(flush) : "memory");
  }
  ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }
#else
 public:
  FlushDenormals() {}
#endif
};
