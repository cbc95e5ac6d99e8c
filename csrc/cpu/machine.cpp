#include "machine.h"

#include <algorithm>
#include <chrono>

#include "kernels.h"
#include "memory.h"
#include "pool.h"

namespace fastgen {
namespace {

// Best of five, in seconds: on a shared machine only the fastest says what it can do.
template <class Body>
double best_seconds(Pool& pool, Body body) {
  double best = 1e30;
  for (int i = 0; i < 5; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(pool.threads(), body);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace

MachineSpeed measure_machine(int threads, const std::string& isa) {
  const Kernels& k = kernels_for(isa);
  Pool pool(threads);
  const Pool::Session session(pool);
  MachineSpeed speed = {};
  constexpr int64_t kRounds = 2000000;
  const double flops = k.peak(1) * kRounds;
  speed.gflops = threads * flops / best_seconds(pool, [&](int) { k.peak(kRounds); }) * 1e-9;

  constexpr int64_t kFloats = int64_t{64} << 20;  // 256 MiB
  const Pages memory(kFloats * sizeof(float), "the memory benchmark");
  float* data = memory.as<float>();
  std::fill_n(data, kFloats, 1.0f);
  const int64_t share = kFloats / threads;
  const double far = best_seconds(pool, [&](int rank) { k.stream(data + rank * share, share); });
  speed.read_gbps = 4e-9 * share * threads / far;

  constexpr int64_t kNear = 96 << 10;  // 384 KiB a core
  constexpr int kTimes = 200;
  const int64_t near = std::min(kNear, share);
  const double close = best_seconds(pool, [&](int rank) {
    for (int i = 0; i < kTimes; ++i) k.stream(data + rank * share, near);
  });
  speed.cached_gbps = 4e-9 * near * kTimes * threads / close;
  return speed;
}

}  // namespace fastgen
