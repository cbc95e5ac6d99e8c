// The compiled interpreter, by precision.
#pragma once
#include "../team/ladder.h"
#include "../team/lowered.h"

namespace fastgen::team {

constexpr int kWarps = 8, kThreads = kWarps * kLanes;  // of a CTA

// For cudaLaunchKernelExC. Parameters: a Launch, the TeamKind, and the number of CTAs of a team.
const void* kernel_of(Precision precision);

}  // namespace fastgen::team
