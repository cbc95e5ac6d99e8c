// The linear part of a stage of fibers: how it is cut, how its weights are packed, and which tiles fit.
#pragma once
#include <cstdint>
#include <vector>

#include "../plan.h"
#include "fibers.h"
#include "lowered.h"

namespace fastgen::team {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Slices of fibers and chunks of K, which depend on the op alone (and with them the order of every sum).
void shape_linear(const Fibers& fibers, int32_t k, Stage* stage);

// Appends the stage's weights, and its bias in the order of its rows.
void pack_linear(const Program& program, const Op& op, const Fibers& fibers, Precision precision, Stage* stage,
                 std::vector<char>* weights, std::vector<float>* consts);

// The widest block of columns whose staged activations (all of K where possible) and registers fit. Throws
// std::invalid_argument where none does.
void choose_tiles(Precision precision, int32_t work_bytes, Stage* stage);

}  // namespace fastgen::team
