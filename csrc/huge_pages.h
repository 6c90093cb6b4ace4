// Huge pages under large memory.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rwkv6 {

// Wants huge pages under large memory that is about to be written from one end to the other, as
// NumPy does for its arrays. Memory fresh from the system is handed out at the first write, with
// huge pages 2 MiB at a time and five times as fast; what has been written before stays where it
// is. (static: nothing is to be shared between instruction sets.)
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
