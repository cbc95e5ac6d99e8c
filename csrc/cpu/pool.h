// A team of threads for one executor. The caller's thread drives: it opens a stage of a few parts, takes part 0
// itself, and the helper of rank r takes part r, so that a helper meets the same weights again and finds them in its
// cache. Stages last microseconds, so helpers spin between them. A helper that is late (the system gave its core to
// somebody else) is not waited for: the driver takes over every part that nobody has begun. So a busy machine costs
// its share and no more, and more threads than cores do no harm.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fastgen {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Whether this is a forked child's copy. Its threads stayed behind: it can neither run nor be destroyed.
  bool forked() const;

  // While a session lives its helpers are awake. One at a time.
  class Session {
   public:
    explicit Session(Pool& pool);
    ~Session();
    Session(const Session&) = delete;

   private:
    Pool& pool_;
  };

  // Calls task(part) for every part in [0, parts), parts <= threads(), each once, and returns when all are done; what
  // they wrote is then visible. Rethrows the first exception of a task. Within a session, from its thread only.
  template <class Task>
  void run(int parts, const Task& task) {
    if (parts == 1) {
      task(0);
      return;
    }
    open(parts, [](const void* context, int part) { (*static_cast<const Task*>(context))(part); }, &task);
  }

 private:
  using Function = void (*)(const void* context, int part);
  static constexpr int kPartBits = 11;
  struct alignas(64) Claim {
    std::atomic<uint64_t> stage{0};  // the last one in which somebody took this part
  };

  void open(int parts, Function function, const void* context);
  bool claim(int part, uint64_t stage);
  void call(int part);
  void help(int rank);

  const int threads_;
  const int process_;
  int spins_;                                    // pauses before an idle thread sleeps
  alignas(64) std::atomic<uint64_t> opened_{0};  // number of the stage << kPartBits | its parts
  Function function_ = nullptr;                  // of the open stage; read only after a successful claim
  const void* context_ = nullptr;
  alignas(64) std::atomic<uint64_t> done_{0};  // parts other than 0 that were finished, ever
  uint64_t stage_ = 0, due_ = 0;               // the driver's: stages opened, parts other than 0 handed out
  std::unique_ptr<Claim[]> claims_;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<bool> active_{false};
  bool closing_ = false;
  std::exception_ptr error_;
  std::vector<std::thread> team_;
};

}  // namespace fastgen
