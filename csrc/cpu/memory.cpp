#include "memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <utility>

namespace fastgen {

Pages::Pages(size_t bytes, const std::string& purpose) {
  constexpr size_t kHuge = size_t{2} << 20;
  const size_t slack = bytes >= kHuge ? kHuge : 0;
  mapped_ = bytes + slack + 1;
  mapping_ = bytes > SIZE_MAX / 4 ? MAP_FAILED
                                  : mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    throw OutOfMemory("not enough memory for " + std::to_string(bytes) + " bytes of " + purpose);
  }
  uintptr_t start = reinterpret_cast<uintptr_t>(mapping_);
  if (slack) {
    start = (start + kHuge - 1) / kHuge * kHuge;
#if defined(MADV_HUGEPAGE)
    madvise(reinterpret_cast<void*>(start), bytes, MADV_HUGEPAGE);  // advice: failure changes nothing but speed
#endif
  }
  data_ = reinterpret_cast<void*>(start);
}

Pages::~Pages() {
  if (mapping_) munmap(mapping_, mapped_);
}

Pages::Pages(Pages&& other) noexcept { *this = std::move(other); }

Pages& Pages::operator=(Pages&& other) noexcept {
  std::swap(mapping_, other.mapping_);
  std::swap(mapped_, other.mapped_);
  std::swap(data_, other.data_);
  return *this;
}

}  // namespace fastgen
