// What this machine can do at best, measured with the executor's own threads and vectors.
#pragma once
#include <string>

namespace fastgen {

struct MachineSpeed {
  double gflops;       // fused multiply-adds in registers, all threads
  double read_gbps;    // reading memory far larger than the last-level cache, all threads, 10^9 bytes a second
  double cached_gbps;  // reading again what fits into the cores' own caches
};

// Takes about half a second. Throws as Pool and kernels_for do.
MachineSpeed measure_machine(int threads, const std::string& isa);

}  // namespace fastgen
