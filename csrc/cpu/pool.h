// A fixed team of threads for one executor. The caller of run() is rank 0; the others sleep between runs and meet at
// spinning barriers within one, because the work between two barriers is a few microseconds.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace fastgen {

class Pool {
 public:
  struct Aborted {};  // thrown out of barrier() when another rank has failed

  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Whether a rank has failed in this run. A rank that meets no barrier for long should ask now and then.
  bool aborted() const { return aborted_.load(std::memory_order_relaxed); }

  // Whether this is a forked child's copy. Its threads stayed behind: it can neither run nor be destroyed.
  bool forked() const;

  // Calls body(rank) on every rank and returns when all are back. If one throws, the others leave at their next
  // barrier, and what it threw is thrown here. Not reentrant.
  void run(const std::function<void(int)>& body);

  // Waits until every rank is here; what any of them wrote before is then visible to all.
  void barrier() {
    if (threads_ == 1) return;
    const uint32_t generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
    } else {
      wait_past(generation);
    }
  }

 private:
  void wait_past(uint32_t generation);
  void work(int rank);
  void call(int rank);

  const int threads_;
  int spins_;  // pauses before a waiting thread starts to yield its core
  int process_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<bool> aborted_{false};

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int)>* body_ = nullptr;
  uint64_t job_ = 0;
  int busy_ = 0;
  bool closing_ = false;
  std::exception_ptr error_;
  std::vector<std::thread> team_;
};

}  // namespace fastgen
