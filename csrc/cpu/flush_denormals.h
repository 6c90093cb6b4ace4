// While an object of this class exists, its thread treats denormal numbers as zero. A state that
// decays to zero would otherwise spend its last steps in denormal numbers, with which computing
// takes a hundred times as long.
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
    // "memory" keeps the loads and stores in between, and arithmetic on them, from moving across
    __asm__ volatile("msr fpcr, %0" : : "r"(flush) : "memory");
  }
  ~FlushDenormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_) : "memory"); }
#else
 public:
  FlushDenormals() {}
#endif
};
