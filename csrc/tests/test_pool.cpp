// Every part of every stage runs once, in order of stages, with few and with far too many threads; exceptions come out.
#include <atomic>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../cpu/pool.h"
#include "check.h"

using fastgen::Pool;

namespace {

// Each stage reads what all parts of the one before wrote, through plain memory.
void stages_follow_each_other(int threads) {
  Pool pool(threads);
  for (int session = 0; session < 3; ++session) {
    const Pool::Session awake(pool);
    std::vector<long> cells(threads, 1), next(threads);
    long expected = threads;
    for (int stage = 0; stage < 300; ++stage) {
      const int parts = 1 + stage * 7 % threads;
      std::fill(next.begin(), next.end(), 0);
      pool.run(parts, [&](int part) { next[part] += std::accumulate(cells.begin(), cells.end(), 0L) % 1000 + part; });
      long sum = 0;
      for (int part = 0; part < parts; ++part) sum += expected % 1000 + part;
      expected = sum;
      cells = next;
      CHECK(std::accumulate(cells.begin(), cells.end(), 0L) == expected, "%d threads, stage %d", threads, stage);
    }
  }
}

void exceptions_come_out(int threads) {
  Pool pool(threads);
  const Pool::Session awake(pool);
  for (int thrower = 0; thrower < threads; ++thrower) {
    std::atomic<int> ran{0};
    bool caught = false;
    try {
      pool.run(threads, [&](int part) {
        ++ran;
        if (part == thrower) throw std::runtime_error("part");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    CHECK(caught && ran == threads, "%d threads, part %d throws, %d ran", threads, thrower, ran.load());
  }
  std::atomic<int> ran{0};
  pool.run(threads, [&](int) { ++ran; });
  CHECK(ran == threads, "%d of %d parts after the exceptions", ran.load(), threads);
}

// Idle helpers fall asleep and still come back.
void long_pauses() {
  Pool pool(3);
  for (int i = 0; i < 3; ++i) {
    const Pool::Session awake(pool);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::atomic<int> ran{0};
    pool.run(3, [&](int) { ++ran; });
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    pool.run(3, [&](int) { ++ran; });
    CHECK(ran == 6, "%d", ran.load());
  }
}

}  // namespace

int main() {
  for (int threads : {1, 2, 3, 9, 32}) {
    stages_follow_each_other(threads);
    exceptions_come_out(threads);
  }
  long_pauses();
  return report("test_pool");
}
