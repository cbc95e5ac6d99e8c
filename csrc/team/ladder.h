// Which teams run a call: the ladder of what fits, from the fastest to the one that always runs.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastgen::team {

enum TeamKind : int32_t { kCtaTeam = 0, kClusterTeam = 1, kGridTeam = 2 };

// What a device can hold at once of the kernel at hand.
struct Limits {
  int32_t ctas = 0;        // resident CTAs
  int32_t clusters16 = 0;  // resident clusters of 16; 0: the device has none
  int32_t clusters8 = 0;
  bool cooperative = false;
};

struct Rung {
  TeamKind kind;
  int32_t ctas;   // of a team
  int32_t teams;  // side by side
};

// wanted: "auto", "cluster16", "cluster8", "grid" or "cta". Throws std::invalid_argument where a wanted rung does not
// exist on the device.
Rung choose_rung(const Limits& limits, int32_t slots, const std::string& wanted);

// "4 clusters of 16 CTAs"
std::string describe(const Rung& rung);

}  // namespace fastgen::team
