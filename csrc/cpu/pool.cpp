#include "pool.h"

#include <unistd.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastgen {
namespace {

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

}  // namespace

Pool::Pool(int threads) : threads_(threads), process_(getpid()) {
  if (threads < 1 || threads > 1024)
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected 1 to 1024");
  // With more threads than cores the one we wait for may need ours.
  spins_ = static_cast<unsigned>(threads) <= std::thread::hardware_concurrency() ? 2000 : 20;
  try {
    for (int rank = 1; rank < threads; ++rank) team_.emplace_back([this, rank] { work(rank); });
  } catch (const std::system_error& e) {
    const size_t started = team_.size();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : team_) t.join();
    throw std::runtime_error("could start only " + std::to_string(started + 1) + " of " + std::to_string(threads) +
                             " threads: " + e.what());
  }
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  wake_.notify_all();
  for (std::thread& t : team_) t.join();
}

bool Pool::forked() const { return threads_ > 1 && getpid() != process_; }

void Pool::run(const std::function<void(int)>& body) {
  arrived_.store(0);
  aborted_.store(false);
  error_ = nullptr;
  body_ = &body;
  if (threads_ > 1) {
    std::lock_guard<std::mutex> lock(mutex_);
    busy_ = threads_ - 1;
    ++job_;
    wake_.notify_all();
  }
  call(0);
  {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    body_ = nullptr;
  }
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Pool::call(int rank) {
  try {
    (*body_)(rank);
  } catch (const Aborted&) {
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    aborted_.store(true);
  }
}

void Pool::work(int rank) {
  uint64_t seen = 0;
  for (;;) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return closing_ || job_ != seen; });
      if (closing_) return;
      seen = job_;
    }
    call(rank);
    std::lock_guard<std::mutex> lock(mutex_);
    if (--busy_ == 0) done_.notify_one();
  }
}

void Pool::wait_past(uint32_t generation) {
  constexpr int kYields = 2000;  // about a millisecond; then a callback or a debugger holds us up, and we sleep
  for (int i = 0; generation_.load(std::memory_order_acquire) == generation; ++i) {
    if (aborted()) throw Aborted{};
    if (i < spins_) {
      relax();
    } else if (i < spins_ + kYields) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
      i = spins_ + kYields;
    }
  }
}

}  // namespace fastgen
