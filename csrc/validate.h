// Checks a program once, so that the executor may trust every index in it.
#pragma once
#include "plan.h"

namespace fastgen {

// Throws std::invalid_argument naming the record ("micro 7 (of op 3): ...") when any index, offset or range leaves its
// table, or when an op reads scratch that nothing has written.
void validate(const Program& program);

// Throws std::invalid_argument where a head by itself asks for what no draw can do (its tables are the program's
// affair).
void validate_head(const Head& head);

// Number of arrays RunArgs::cond must hold: one more than the largest index a Cond buffer names.
int32_t num_conds(const Program& program);

}  // namespace fastgen
