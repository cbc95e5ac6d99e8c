// A checksum of weights that sees every bit and every place: one read at the speed of memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace fastgen {

// Eight lanes of Fletcher's sums (Fletcher 1982) over 64-bit words: s += word, t += s. The second sum weighs a word
// with its distance from the end, so words that change places change it; what lanes hold is joined by a polynomial.
inline uint64_t checksum(const uint8_t* bytes, int64_t count) {
  constexpr int kLanes = 8;
  constexpr int64_t kBlock = kLanes * 8;
  uint64_t s[kLanes] = {}, t[kLanes] = {}, w[kLanes];
  const auto add = [&](const uint8_t* from) {
    std::memcpy(w, from, kBlock);
    for (int k = 0; k < kLanes; ++k) {
      s[k] += w[k];
      t[k] += s[k];
    }
  };
  int64_t at = 0;
  for (; at + kBlock <= count; at += kBlock) add(bytes + at);
  if (at < count) {
    uint8_t rest[kBlock] = {};
    std::memcpy(rest, bytes + at, static_cast<size_t>(count - at));
    add(rest);
  }
  uint64_t joined = static_cast<uint64_t>(count);
  for (int k = 0; k < kLanes; ++k) {
    joined = (joined ^ s[k]) * 0x9E3779B97F4A7C15u;
    joined = (joined ^ (joined >> 29) ^ t[k]) * 0xBF58476D1CE4E5B9u;
  }
  return joined ^ (joined >> 32);
}

struct Bytes {
  const uint8_t* at;
  int64_t count;
};

// The checksums of several pieces of memory, each by one of a few threads, which live as long as the call.
inline std::vector<uint64_t> checksums(const std::vector<Bytes>& pieces, int threads) {
  constexpr int64_t kWorthAThread = int64_t{4} << 20;
  int64_t total = 0;
  for (const Bytes& piece : pieces) total += piece.count;
  threads = static_cast<int>(std::clamp<int64_t>(total / kWorthAThread, 1, std::max(1, threads)));
  std::vector<uint64_t> found(pieces.size());
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t k = next++; k < pieces.size(); k = next++) found[k] = checksum(pieces[k].at, pieces[k].count);
  };
  std::vector<std::thread> others;
  for (int k = 1; k < threads; ++k) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  return found;
}

}  // namespace fastgen
