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

// Waits a little longer each time: a pause, later a short sleep. (To yield would be worse than to sleep: the system
// then runs everybody else first, and prefers who wakes from sleep.)
class Patience {
 public:
  explicit Patience(int spins) : spins_(spins) {}

  void wait() {
    if (count_ == spins_) {
      std::this_thread::sleep_for(std::chrono::microseconds(30));
      return;
    }
    ++count_;
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  void restart() { count_ = 0; }

 private:
  const int spins_;
  int count_ = 0;
};

}  // namespace

Pool::Pool(int threads) : threads_(threads), process_(getpid()) {
  if (threads < 1 || threads > 1024)
    throw std::invalid_argument("threads is " + std::to_string(threads) + ", expected 1 to 1024");
  claims_.reset(new Claim[threads]);
  // With more threads than cores the one we wait for may need ours.
  spins_ = static_cast<unsigned>(threads) <= std::thread::hardware_concurrency() ? 4000 : 50;
  try {
    for (int rank = 1; rank < threads; ++rank) team_.emplace_back([this, rank] { help(rank); });
  } catch (const std::system_error& e) {
    const std::string started = std::to_string(team_.size() + 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : team_) t.join();
    throw std::runtime_error("could start only " + started + " of " + std::to_string(threads) +
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

Pool::Session::Session(Pool& pool) : pool_(pool) {
  if (pool_.threads_ == 1) return;
  std::lock_guard<std::mutex> lock(pool_.mutex_);
  pool_.active_.store(true);
  pool_.wake_.notify_all();
}

Pool::Session::~Session() { pool_.active_.store(false); }

void Pool::help(int rank) {
  uint64_t seen = 0;
  for (;;) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return closing_ || active_.load(); });
      if (closing_) return;
    }
    for (Patience patience(spins_); active_.load(std::memory_order_relaxed);) {
      const uint64_t opened = opened_.load(std::memory_order_acquire);
      if (opened == seen) {
        patience.wait();
        continue;
      }
      seen = opened;
      const int parts = static_cast<int>(opened & ((1 << kPartBits) - 1));
      if (rank < parts && claim(rank, opened >> kPartBits)) call(rank);
      patience.restart();
    }
  }
}

// A stage ends only after all its parts were claimed, so who claims a part of a stage knows that it is still open.
bool Pool::claim(int part, uint64_t stage) {
  uint64_t last = claims_[part].stage.load(std::memory_order_relaxed);
  return last < stage && claims_[part].stage.compare_exchange_strong(last, stage, std::memory_order_acq_rel);
}

void Pool::call(int part) {
  try {
    function_(context_, part);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
  }
  if (part > 0) done_.fetch_add(1, std::memory_order_release);
}

void Pool::open(int parts, Function function, const void* context) {
  function_ = function, context_ = context;
  due_ += parts - 1;
  opened_.store(++stage_ << kPartBits | static_cast<uint64_t>(parts), std::memory_order_release);
  call(0);
  Patience patience(spins_);
  const auto done = [this] { return done_.load(std::memory_order_acquire) == due_; };
  for (int i = 0; i < 16 && !done(); ++i) patience.wait();  // usually enough; looking at every claim costs more
  for (int part = 1; part < parts && !done(); ++part)
    if (claim(part, stage_)) call(part);
  while (!done()) patience.wait();
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

}  // namespace fastgen
