#include "executor.h"

#include <chrono>
#include <cstring>

#include "../validate.h"
#include "driver.h"

namespace fastgen {
namespace {

// Decides when the callback is due and turns its refusal into an exception.
class Reporter {
 public:
  Reporter(const Program& program, const Executor::Progress& progress) : program_(program), progress_(progress) {}

  void step_done(int64_t steps) {
    if (!progress_) return;
    const auto now = std::chrono::steady_clock::now();
    const bool row_done = program_.rows > 1 && steps % program_.row_len == 0;
    if (!row_done && steps < program_.steps && now - last_ < std::chrono::milliseconds(50)) return;
    if (!progress_(steps))
      throw Cancelled("cancelled after " + std::to_string(steps) + " of " + std::to_string(program_.steps) + " steps");
    last_ = std::chrono::steady_clock::now();
  }

 private:
  const Program& program_;
  const Executor::Progress& progress_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

void check(const Program& p, const RunArgs& a) {
  if (a.slots < 1 || a.slots > (1 << 20))
    throw std::invalid_argument("slots is " + std::to_string(a.slots) + ", expected 1 to 2^20");
  if (!(a.temperature > 0)) throw std::invalid_argument("temperature must be above 0");
  if (!a.out) throw std::invalid_argument("out is null");
  if (a.mask && !a.given) throw std::invalid_argument("mask without given values");
  for (int32_t i = 0; i < num_conds(p); ++i)
    if (!a.cond || !a.cond[i]) throw std::invalid_argument("cond " + std::to_string(i) + " is missing");
}

// Floats from one slot's arena to the next: an odd number of cache lines, so that the same place in neighbouring
// slots, read side by side by a tile, does not fall into one cache set.
int64_t slot_floats(int64_t arena) { return ((arena + 15) / 16 | 1) * 16; }

std::vector<BufferPlace> find_places(const Program& p, const RunArgs& args, float* arena) {
  std::vector<BufferPlace> places;
  for (int32_t i = 0; i < p.nbuffers; ++i) {
    const Buffer& b = p.buffers[i];
    const int64_t size = static_cast<int64_t>(b.rows) * b.cols * b.channels;
    if (b.kind == kCond)
      places.push_back({const_cast<float*>(args.cond[b.offset]), size, b.channels, b.rows, b.cols});
    else if (b.kind == kConst)
      places.push_back({const_cast<float*>(p.consts + b.offset), 0, b.channels, b.rows, b.cols});
    else
      places.push_back({arena + b.offset, slot_floats(p.arena), b.channels, b.ring_rows, b.ring_cols});
  }
  return places;
}

void write_start(const Program& p, const RunArgs& args, const BufferPlace& input) {
  if (p.head.start < 0) return;
  for (int64_t slot = 0; slot < args.slots; ++slot)
    std::memcpy(input.base + slot * input.slot, p.consts + p.head.start, sizeof(float) * p.head.channels * p.head.enc);
}

void run_schedule(const Program& p, Driver& driver, Reporter& reporter) {
  int64_t period = 0;
  int32_t slot = 0;  // step % period
  for (int64_t step = 0; step < p.steps; ++step) {
    if (slot % p.row_len == 0) {
      const int32_t* row = p.row_ptr + slot / p.row_len;
      driver.run_items(p.row_items + row[0], p.row_items + row[1], period);
    }
    driver.run_items(p.step_items + p.step_ptr[slot], p.step_items + p.step_ptr[slot + 1], period);
    driver.draw(step);
    reporter.step_done(step + 1);
    if (++slot == p.period) slot = 0, ++period;
  }
}

}  // namespace

Executor::Executor(const Program& program, int threads, const std::string& isa)
    : kernels_(kernels_for(isa)), tables_(program, kernels_), pool_(new Pool(threads)) {}

Executor::~Executor() {
  if (pool_->forked()) (void)pool_.release();
}

void Executor::run(const RunArgs& args, const Progress& progress) {
  const Program& p = tables_.program();
  check(p, args);
  if (runner_.load() == std::this_thread::get_id())
    throw std::logic_error("this executor is running already: a callback cannot start another run on it");
  if (pool_->forked())
    throw std::logic_error(
        "this executor belongs to the parent process: its threads do not survive a fork; compile "
        "again in the child");
  std::lock_guard<std::mutex> lock(turn_);
  runner_.store(std::this_thread::get_id());
  struct Leave {
    std::atomic<std::thread::id>& runner;
    ~Leave() { runner.store({}); }
  } leave{runner_};

  const Pages arena(sizeof(float) * args.slots * slot_floats(p.arena),
                    "state for " + std::to_string(args.slots) + " samples side by side");
  const Pages zeros(sizeof(float) * tables_.max_nchan, "zeros");
  Run run{tables_, kernels_, args, find_places(p, args, arena.as<float>()), zeros.as<float>(), {}};
  write_start(p, args, run.places[p.head.input]);
  Driver driver(run, *pool_);
  Reporter reporter(p, progress);
  const Pool::Session session(*pool_);
  run_schedule(p, driver, reporter);
}

}  // namespace fastgen
