// Checksums of many pieces are those of each, with few and with far too many threads; a bit or a place changes them.
#include <cstdint>
#include <vector>

#include "../checksum.h"
#include "check.h"

using fastgen::Bytes;
using fastgen::checksum;
using fastgen::checksums;

namespace {

std::vector<std::vector<uint8_t>> pieces() {
  std::vector<std::vector<uint8_t>> made;
  uint64_t state = 1;
  for (const size_t size :
       {size_t{0}, size_t{1}, size_t{63}, size_t{64}, size_t{65}, size_t{5} << 20, size_t{4} << 20}) {
    std::vector<uint8_t> bytes(size);
    for (uint8_t& b : bytes)
      b = static_cast<uint8_t>((state = state * 6364136223846793005u + 1442695040888963407u) >> 56);
    made.push_back(std::move(bytes));
  }
  return made;
}

void many_are_those_of_each(int threads) {
  const auto all = pieces();
  std::vector<Bytes> asked;
  for (const auto& piece : all) asked.push_back({piece.data(), static_cast<int64_t>(piece.size())});
  const auto found = checksums(asked, threads);
  CHECK(found.size() == all.size(), "%zu", found.size());
  for (size_t k = 0; k < all.size(); ++k)
    CHECK(found[k] == checksum(asked[k].at, asked[k].count), "piece %zu with %d threads", k, threads);
}

void every_bit_and_place_counts() {
  std::vector<uint8_t> bytes(200);
  for (size_t k = 0; k < bytes.size(); ++k) bytes[k] = static_cast<uint8_t>(k * 7);
  const auto sum = [&] { return checksum(bytes.data(), static_cast<int64_t>(bytes.size())); };
  const uint64_t before = sum();
  for (size_t k = 0; k < bytes.size(); ++k)
    for (int bit = 0; bit < 8; ++bit) {
      bytes[k] = static_cast<uint8_t>(bytes[k] ^ (1 << bit));
      CHECK(sum() != before, "bit %d of byte %zu", bit, k);
      bytes[k] = static_cast<uint8_t>(bytes[k] ^ (1 << bit));
    }
  std::swap(bytes[0], bytes[64]);  // the same lane, another word
  CHECK(sum() != before, "two words changed places");
}

}  // namespace

int main() {
  for (const int threads : {1, 2, 3, 64}) many_are_those_of_each(threads);
  every_bit_and_place_counts();
  CHECK(checksums({}, 4).empty(), "nothing");
  return report("test_checksum");
}
