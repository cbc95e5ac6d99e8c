// Takes an op's vector program apart into fibers (lowered.h).
#pragma once
#include <vector>

#include "../plan.h"
#include "lowered.h"

namespace fastgen::team {

// The vector program with places numbered: kLoad.a and kStore.b name entries. `scratch` floats, the linear part's `acc`
// rows at 0.
struct Code {
  std::vector<Micro> micros;
  int32_t acc, scratch;
};

struct Fibers {
  int32_t fibers = 0, rows = 0;  // rows: linear rows of a fiber
  std::vector<int32_t> row_of;   // [fibers][rows]: linear row, -1: none
  std::vector<Instr> instrs;     // loads first
  int32_t nloads = 0, registers = 0;
};

// False where lanes depend on each other across, or the pieces would be too many; then `out` is not to be used.
bool split_fibers(const Code& code, const float* consts, Fibers* out);

}  // namespace fastgen::team
