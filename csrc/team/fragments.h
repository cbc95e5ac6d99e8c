// Which lane of a warp holds what in mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"), for 16-bit operands
// and 32-bit accumulators. All that packs, loads or emulates fragments asks here. With g = lane / 4 and t = lane % 4:
//   A 16 x 16  element e of 8: row g + 8 * (e / 2 % 2), k = 2 * t + e % 2 + 8 * (e / 4)
//   B 16 x 8   element e of 4: k = 2 * t + e % 2 + 8 * (e / 2), column g
//   C 16 x 8   element e of 4: row g + 8 * (e / 2), column 2 * t + e % 2
#pragma once
#include "../rng.h"

namespace fastgen::team {

FG_HD constexpr int a_row(int lane, int e) { return lane / 4 + 8 * (e / 2 % 2); }
FG_HD constexpr int a_k(int lane, int e) { return 2 * (lane % 4) + e % 2 + 8 * (e / 4); }
FG_HD constexpr int b_k(int lane, int e) { return 2 * (lane % 4) + e % 2 + 8 * (e / 2); }
FG_HD constexpr int b_col(int lane) { return lane / 4; }
FG_HD constexpr int c_row(int lane, int e) { return lane / 4 + 8 * (e / 2); }
FG_HD constexpr int c_col(int lane, int e) { return 2 * (lane % 4) + e % 2; }

}  // namespace fastgen::team
