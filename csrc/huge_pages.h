// Huge pages under large memory.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rwkv6 {

// Asks for huge pages under large memory that is about to be written from one end to the other, as
// NumPy does for its arrays. The system provides fresh memory page by page at the first write; with
// huge pages of 2 MiB that is five times as fast. Memory that has been written before is not moved.
// (static, so that the copies compiled for different instruction sets are not merged by the
// linker.)
static inline void want_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  constexpr size_t kLarge = size_t(1) << 22;
  if (bytes < kLarge) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const uintptr_t end = (address + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), size_t(end - begin), MADV_HUGEPAGE);  // may be refused
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace rwkv6
