// Memory in pages of 2 MiB: the translation of addresses then does not hold up what is read from end to end, or all over.

#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace {

constexpr uintptr_t kLargePage = 1 << 21;

// To be called before it is written.
inline void prefer_large_pages(void* begin, size_t num_bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t from = (reinterpret_cast<uintptr_t>(begin) + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(begin) + num_bytes) / kLargePage * kLargePage;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

// What a thread works on, as large as it has ever been.
class Scratch {
 public:
  // Anything, in at least so many bytes, at a multiple of a page.
  char* of(size_t num_bytes) {
    if (num_bytes > size_) {
      size_ = (num_bytes + kLargePage - 1) / kLargePage * kLargePage;
      memory_.reset(static_cast<char*>(std::aligned_alloc(kLargePage, size_)));
      prefer_large_pages(memory_.get(), size_);
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0;
};

}  // namespace
