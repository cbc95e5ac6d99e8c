// Runs programs (plan.h) on the CPU.
#pragma once
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "../plan.h"
#include "kernels.h"
#include "pool.h"
#include "tables.h"

namespace fastgen {

struct Cancelled : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Executor {
 public:
  // Called on the thread of run() with the number of steps done; false cancels the run.
  using Progress = std::function<bool(int64_t steps_done)>;

  // Copies and validates the program. threads: 1 to 1024. isa: see kernels_for.
  // Throws std::invalid_argument, OutOfMemory, std::runtime_error (no threads to be had).
  Executor(const Program& program, int threads, const std::string& isa);
  ~Executor();

  // Samples args.slots samples. `progress` is called after every row of an image and at least every 50 ms or so (one
  // step, if that is longer), with `out` complete for the steps done. One run at a time; others wait for their turn.
  // Throws Cancelled, OutOfMemory, std::invalid_argument, std::logic_error (called from its own callback, or in a
  // forked child), and what `progress` throws; afterwards the executor can run again.
  void run(const RunArgs& args, const Progress& progress = {});

  const Program& program() const { return tables_.program(); }
  int threads() const { return pool_->threads(); }
  const char* isa() const { return kernels_.name; }

 private:
  const Kernels& kernels_;
  Tables tables_;
  std::unique_ptr<Pool> pool_;
  std::mutex turn_;
  std::atomic<std::thread::id> runner_{};
};

}  // namespace fastgen
