// Noise from counters: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3",
// SC 2011). The key is the seed, the counter (block, step, sample low, sample high); so a number depends on its name
// alone, never on who asks for it, when, or in what company. fastgen/rng.py makes the same numbers.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FG_HD __host__ __device__
#else
#define FG_HD
#endif

namespace fastgen {

struct Block {
  uint32_t lane[4];
};

FG_HD inline Block philox(Block counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t{0xD2511F53u} * counter.lane[0];
    const uint64_t odd = uint64_t{0xCD9E8D57u} * counter.lane[2];
    counter = {{static_cast<uint32_t>(odd >> 32) ^ counter.lane[1] ^ key0, static_cast<uint32_t>(odd),
                static_cast<uint32_t>(even >> 32) ^ counter.lane[3] ^ key1, static_cast<uint32_t>(even)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// 32 random bits to an odd multiple of 2^-33, strictly inside (0, 1). Every operation is exact.
FG_HD inline double unit_interval(uint32_t bits) {
  return (static_cast<double>(bits) + 0.5) * 2.3283064365386962890625e-10;  // 2^-32
}

// The four uniforms 4 * block ... 4 * block + 3 of a step of a sample.
FG_HD inline void uniform_block(uint64_t seed, uint64_t sample, uint32_t step, uint32_t block, double u[4]) {
  const Block bits = philox({{block, step, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32)}},
                            static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  for (int i = 0; i < 4; ++i) u[i] = unit_interval(bits.lane[i]);
}

// Uniform j of a step of a sample.
FG_HD inline double uniform(uint64_t seed, uint64_t sample, uint32_t step, uint32_t j) {
  double u[4];
  uniform_block(seed, sample, step, j / 4, u);
  return u[j % 4];
}

}  // namespace fastgen
