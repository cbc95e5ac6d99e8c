// Lowers a program (plan.h) for the team interpreter; see lowered.h for what comes out.
#pragma once
#include <vector>

#include "../plan.h"
#include "lowered.h"

namespace fastgen::team {

struct LowerOptions {
  Precision precision = kFloat32;
  int32_t shared_bytes = 48 << 10;  // shared memory of a CTA
};

// The block. Validates the program. Throws std::invalid_argument where a table is wrong, or where an op needs more
// shared memory than there is, naming the op.
std::vector<char> lower(const Program& program, const LowerOptions& options);

}  // namespace fastgen::team
