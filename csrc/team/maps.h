// The maps of the vector program, one number at a time; csrc/cpu/kernels.cpp has them for vectors.
#pragma once
#include <math.h>

#include "../functions.h"
#include "../rng.h"
#include "lowered.h"

namespace fastgen::team {

FG_HD inline float maximum(float a, float b) { return a != a || a > b ? a : b; }  // NaN wins, as in torch
FG_HD inline float minimum(float a, float b) { return a != a || a < b ? a : b; }
FG_HD inline float truth(bool x) { return x ? 1.0f : 0.0f; }
FG_HD inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

FG_HD inline float remainder_of(float a, float b) {
  const float r = fmodf(a, b);
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}

// Sine, or (quadrant 1) cosine. The reduction is in double, so arguments to about 2^40 keep their digits; the library's
// own, which is exact for all, needs local memory on a GPU.
FG_HD inline float sine(float x, int quadrant) {
  const double n = rint(x * 0.63661977236758134308);
  const double r = fma(-n, 6.123233995736766e-17, fma(-n, 1.5707963267948966, static_cast<double>(x)));
  const int q = static_cast<int>((static_cast<int64_t>(n) + quadrant) & 3);
  const double s = r * r;
  const double odd = fma(r * s, fma(s, fma(s, -1.951529589e-4, 8.3321608736e-3), -1.6666654611e-1), r);
  const double even =
      fma(s * s, fma(s, fma(s, 2.443315711809948e-5, -1.388731625493765e-3), 4.166664568298827e-2), fma(s, -0.5, 1.0));
  const double y = q & 1 ? even : odd;
  return static_cast<float>(q & 2 ? -y : y);
}

FG_HD inline float power(float x, float e) {
  if (e == 2.0f) return x * x;
  if (e == 3.0f) return x * x * x;
  if (e == 0.5f) return sqrtf(x);
  if (e == -0.5f) return 1.0f / sqrtf(x);
  if (e == -1.0f) return 1.0f / x;
  if (e == -2.0f) return 1.0f / (x * x);
  return powf(x, e);
}

// fn of kNeg and on, no reduction; imm: imm0 to imm2.
FG_HD inline float map_of(int32_t fn, float a, float b, float c, const float* imm) {
  switch (fn) {
    case kCopy: return a;
    case kFill: return imm[0];
    case kNeg: return -a;
    case kExp: return expf(a);
    case kLog: return logf(a);
    case kTanh: return tanhf(a);
    case kSigmoid: return sigmoid(a);
    case kRelu: return maximum(a, 0.0f);
    case kAbs: return fabsf(a);
    case kSqrt: return sqrtf(a);
    case kRsqrt: return 1.0f / sqrtf(a);
    case kSin: return sine(a, 0);
    case kCos: return sine(a, 1);
    case kReciprocal: return 1.0f / a;
    case kLog1p: return log1pf(a);
    case kExpm1: return expm1f(a);
    case kErf: return erff(a);
    case kSign: return a > 0 ? 1.0f : a < 0 ? -1.0f : a;
    case kFloor: return floorf(a);
    case kCeil: return ceilf(a);
    case kRound: return rintf(a);
    case kTrunc: return truncf(a);
    case kNot: return truth(a == 0.0f);
    case kSilu: return a * sigmoid(a);
    case kGelu: return 0.5f * a * (1.0f + erff(a * 0.70710678f));
    case kGeluTanh: return 0.5f * a * (1.0f + tanhf(0.79788456f * fmaf(a * a * a, 0.044715f, a)));
    case kElu: return a > 0 ? imm[1] * a : imm[1] * imm[0] * expm1f(a * imm[2]);
    case kLeakyRelu: return a > 0 ? a : a * imm[0];
    case kSoftplus: return a * imm[0] > imm[1] ? a : log1pf(expf(a * imm[0])) / imm[0];
    case kClamp: return minimum(maximum(a, imm[0]), imm[1]);
    case kAffine: return fmaf(a, imm[0], imm[1]);
    case kPowScalar: return power(a, imm[0]);
    case kScalarPow: return powf(imm[0], a);
    case kAtan: return atanf(a);
    case kAdd: return a + b;
    case kSub: return a - b;
    case kMul: return a * b;
    case kDiv: return a / b;
    case kMaximum: return b != b ? b : maximum(a, b);
    case kMinimum: return b != b ? b : minimum(a, b);
    case kPow: return powf(a, b);
    case kEq: return truth(a == b);
    case kNe: return truth(a != b);
    case kGt: return truth(a > b);
    case kGe: return truth(a >= b);
    case kLt: return truth(a < b);
    case kLe: return truth(a <= b);
    case kAnd: return truth(a != 0 && b != 0);
    case kOr: return truth(a != 0 || b != 0);
    case kRemainder: return remainder_of(a, b);
    case kMulAdd: return fmaf(a, b, c);
    case kWhere: return a != 0 ? b : c;
    default: return 0.0f;
  }
}

// How many vectors of operands a micro-op reads through a, b, c, movement included.
FG_HD inline int operands_of(int32_t fn) {
  if (fn == kLoad || fn == kFill) return 0;
  return function_kind(fn) == FunctionKind::Move ? 1 : arity(fn);
}

}  // namespace fastgen::team
