// What functions.def says of a function, by its code.
#pragma once
#include "plan.h"
#include "rng.h"

namespace fastgen {

enum class FunctionKind : int32_t { Move, Map, Reduce, None };

FG_HD inline FunctionKind function_kind(int32_t fn) {
  switch (fn) {
#define FG_FUNCTION(kind, name, code, operands, cycles) \
  case code: return FunctionKind::kind;
#include "functions.def"
#undef FG_FUNCTION
    default: return FunctionKind::None;
  }
}

// How many of the operands a, b, c of a map or reduction are vectors; 0 for movement and for what is no function.
FG_HD inline int arity(int32_t fn) {
  switch (fn) {
#define FG_FUNCTION(kind, name, code, operands, cycles) \
  case code: return operands;
#include "functions.def"
#undef FG_FUNCTION
    default: return 0;
  }
}

// Rough cycles of one vector.
inline double cycles_of(int32_t fn) {
  switch (fn) {
#define FG_FUNCTION(kind, name, code, operands, cycles) \
  case code: return cycles;
#include "functions.def"
#undef FG_FUNCTION
    default: return 0;
  }
}

}  // namespace fastgen
