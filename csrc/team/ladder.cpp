// A team's latency is that of its barrier: a cluster's is about a fifth of one through memory, so clusters come first.
// As many teams as there is room for, each with its share of the slots: fewer columns a team is less work between two
// barriers.
#include "ladder.h"

#include <algorithm>

namespace fastgen::team {
namespace {

constexpr int32_t kGridTeamCtas = 16;  // more make the barrier slower than the work between two

Rung teams_of(TeamKind kind, int32_t ctas, int32_t room, int32_t slots) {
  return {kind, ctas, std::clamp(slots, 1, std::max(room, 1))};
}

}  // namespace

Rung choose_rung(const Limits& limits, int32_t slots, const std::string& wanted) {
  const bool any = wanted == "auto";
  if (!any && wanted != "cluster16" && wanted != "cluster8" && wanted != "grid" && wanted != "cta")
    throw std::invalid_argument("team='" + wanted + "': expected auto, cluster16, cluster8, grid or cta");
  if ((any || wanted == "cluster16") && limits.clusters16 > 0)
    return teams_of(kClusterTeam, 16, limits.clusters16, slots);
  if ((any || wanted == "cluster8") && limits.clusters8 > 0) return teams_of(kClusterTeam, 8, limits.clusters8, slots);
  if ((any || wanted == "grid") && limits.cooperative && limits.ctas > 1) {
    const int32_t ctas = std::min(kGridTeamCtas, limits.ctas);
    return teams_of(kGridTeam, ctas, limits.ctas / ctas, slots);
  }
  if (any || wanted == "cta") return teams_of(kCtaTeam, 1, limits.ctas, slots);
  throw std::invalid_argument("team='" + wanted + "': this device cannot hold such a team (" +
                              std::to_string(limits.ctas) + " CTAs, " + std::to_string(limits.clusters16) +
                              " clusters of 16, " + std::to_string(limits.clusters8) + " of 8)");
}

std::string describe(const Rung& rung) {
  const std::string many = std::to_string(rung.teams), s = rung.teams == 1 ? "" : "s";
  if (rung.kind == kCtaTeam) return many + " CTA" + s;
  return many + (rung.kind == kClusterTeam ? " cluster" : " team") + s + " of " + std::to_string(rung.ctas) + " CTAs";
}

}  // namespace fastgen::team
