// Large arrays: zeroed, page aligned, on huge pages where the system has them (weights are read in long streams).
#pragma once
#include <cstddef>
#include <new>
#include <string>

namespace fastgen {

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string text) : text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

class Pages {
 public:
  Pages() = default;
  // Throws OutOfMemory, which names `purpose` and the size.
  Pages(size_t bytes, const std::string& purpose);
  ~Pages();
  Pages(Pages&& other) noexcept;
  Pages& operator=(Pages&& other) noexcept;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* mapping_ = nullptr;
  size_t mapped_ = 0;
  void* data_ = nullptr;
};

}  // namespace fastgen
