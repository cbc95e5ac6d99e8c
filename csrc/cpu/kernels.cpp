// The inner loops: tiles of the linear part and the maps of the vector program.
//
// A tile computes P panels of 16 outputs for C columns. Its P*C accumulators stay in registers over all taps and
// channels; per channel it reads one row of each panel and broadcasts one number of each column. Every output has one
// accumulator, which sees taps in table order and channels ascending, whatever P, C and the width are: that is what
// makes bytes independent of batch and threads. Few columns and many panels read long streams of weights (a matrix
// vector product, bound by memory); three panels and eight columns are bound by arithmetic.
//
// This file is compiled once per instruction set (see simd.h for what that forbids).
#include "kernels.h"

#include "../plan.h"
#include "mathfn.h"

namespace fastgen {
namespace FG_ISA {

#define FG_UNROLL _Pragma("GCC unroll 16")

constexpr int kVectors = kPanel / kWidth;              // of one panel
constexpr int kAccumulators = kWidth == 16 ? 24 : 12;  // registers that leave room for weights and a broadcast

constexpr int max_columns(int panels) {
  return kAccumulators / (panels * kVectors) < kMaxColumns ? kAccumulators / (panels * kVectors) : kMaxColumns;
}

// clang-format off: it does not see the loops behind FG_UNROLL
template <class Weight, int P, int C>
void tile(const void* weights, int64_t stride, const int32_t* nchan, int ntaps, const float* const* x, int64_t ldx,
          float* out, int64_t ldout) {
  Vec acc[P][C][kVectors];
  FG_UNROLL for (int p = 0; p < P; ++p)
    FG_UNROLL for (int c = 0; c < C; ++c)
      FG_UNROLL for (int v = 0; v < kVectors; ++v) acc[p][c][v] = load(out + c * ldout + p * kPanel + v * kWidth);
  const Weight* w = static_cast<const Weight*>(weights);
  for (int t = 0; t < ntaps; ++t) {
    const float* column[C];
    FG_UNROLL for (int c = 0; c < C; ++c) column[c] = x[t * ldx + c];
    const int n = nchan[t];
    for (int k = 0; k < n; ++k, w += kPanel) {
      Vec row[P][kVectors];
      FG_UNROLL for (int p = 0; p < P; ++p)
        FG_UNROLL for (int v = 0; v < kVectors; ++v) row[p][v] = load(w + p * stride + v * kWidth);
      FG_UNROLL for (int c = 0; c < C; ++c) {
        const Vec value = splat(column[c][k]);
        FG_UNROLL for (int p = 0; p < P; ++p)
          FG_UNROLL for (int v = 0; v < kVectors; ++v) acc[p][c][v] = fma(row[p][v], value, acc[p][c][v]);
      }
    }
  }
  FG_UNROLL for (int p = 0; p < P; ++p)
    FG_UNROLL for (int c = 0; c < C; ++c)
      FG_UNROLL for (int v = 0; v < kVectors; ++v) store(out + c * ldout + p * kPanel + v * kWidth, acc[p][c][v]);
}
// clang-format on

template <int P, int C>
struct FillTiles {
  static void into(Kernels& k) {
    if constexpr (C <= max_columns(P)) {
      k.tile[0][P][C] = tile<float, P, C>;
      k.tile[1][P][C] = tile<uint16_t, P, C>;
      k.max_columns[P] = C;
    }
    if constexpr (C < kMaxColumns)
      FillTiles<P, C + 1>::into(k);
    else if constexpr (P < kMaxPanels)
      FillTiles<P + 1, 1>::into(k);
  }
};

// A whole map: full vectors, then the tail through a padded copy, so that every element sees the same operations.
template <class Fn>
FG_INLINE void apply(float* dst, const float* a, const float* b, const float* c, int n, Fn fn) {
  int i = 0;
  for (; i + kWidth <= n; i += kWidth)
    store(dst + i, fn(load(a + i), b ? load(b + i) : Vec{}, c ? load(c + i) : Vec{}));
  if (i == n) return;
  float pad[3][kWidth] = {};
  for (int j = i; j < n; ++j) {
    pad[0][j - i] = a[j];
    if (b) pad[1][j - i] = b[j];
    if (c) pad[2][j - i] = c[j];
  }
  store(pad[0], fn(load(pad[0]), load(pad[1]), load(pad[2])));
  for (int j = i; j < n; ++j) dst[j] = pad[0][j - i];
}

// `m` is the imm0..2 of the micro-op.
#define FG_UNARY(name, expression)                                                                 \
  void map_##name(float* dst, const float* a, const float*, const float*, int n, const float* m) { \
    (void)m;                                                                                       \
    apply(dst, a, nullptr, nullptr, n, [m](Vec x, Vec, Vec) -> Vec {                               \
      (void)m;                                                                                     \
      return expression;                                                                           \
    });                                                                                            \
  }
#define FG_BINARY(name, expression)                                                                \
  void map_##name(float* dst, const float* a, const float* b, const float*, int n, const float*) { \
    apply(dst, a, b, nullptr, n, [](Vec x, Vec y, Vec) -> Vec { return expression; });             \
  }
#define FG_TERNARY(name, expression)                                                                 \
  void map_##name(float* dst, const float* a, const float* b, const float* c, int n, const float*) { \
    apply(dst, a, b, c, n, [](Vec x, Vec y, Vec z) -> Vec { return expression; });                   \
  }
#define FG_ZERO splat(0.0f)
#define FG_ONE splat(1.0f)

FG_UNARY(Neg, -x)
FG_UNARY(Exp, exp(x))
FG_UNARY(Log, log(x))
FG_UNARY(Tanh, tanh(x))
FG_UNARY(Sigmoid, sigmoid(x))
FG_UNARY(Relu, maximum(x, FG_ZERO))
FG_UNARY(Abs, abs(x))
FG_UNARY(Sqrt, sqrt(x))
FG_UNARY(Rsqrt, FG_ONE / sqrt(x))
FG_UNARY(Sin, sine(x, 0))
FG_UNARY(Cos, sine(x, 1))
FG_UNARY(Reciprocal, FG_ONE / x)
FG_UNARY(Log1p, log1p(x))
FG_UNARY(Expm1, expm1(x))
FG_UNARY(Erf, erf(x))
FG_UNARY(Sign, sign(x))
FG_UNARY(Floor, floor(x))
FG_UNARY(Ceil, ceil(x))
FG_UNARY(Round, round_even(x))
FG_UNARY(Trunc, trunc(x))
FG_UNARY(Not, truth(x == FG_ZERO))
FG_UNARY(Silu, x* sigmoid(x))
FG_UNARY(Gelu, gelu(x))
FG_UNARY(GeluTanh, gelu_tanh(x))
FG_UNARY(Elu, select(x > FG_ZERO, splat(m[1]) * x, splat(m[1] * m[0]) * expm1(x * splat(m[2]))))
FG_UNARY(LeakyRelu, select(x > FG_ZERO, x, x* splat(m[0])))
FG_UNARY(Softplus, select(x* splat(m[0]) > splat(m[1]), x, log1p(exp(x* splat(m[0]))) / splat(m[0])))
FG_UNARY(Clamp, clamp(x, m[0], m[1]))
FG_UNARY(Affine, fma(x, splat(m[0]), splat(m[1])))
FG_UNARY(PowScalar, power(x, m[0]))
FG_UNARY(ScalarPow, each(::powf, splat(m[0]), x))
FG_UNARY(Atan, each(::atanf, x))
FG_BINARY(Add, x + y)
FG_BINARY(Sub, x - y)
FG_BINARY(Mul, x* y)
FG_BINARY(Div, x / y)
FG_BINARY(Maximum, maximum(x, y))
FG_BINARY(Minimum, minimum(x, y))
FG_BINARY(Pow, each(::powf, x, y))
FG_BINARY(Eq, truth(x == y))
FG_BINARY(Ne, truth(x != y))
FG_BINARY(Gt, truth(x > y))
FG_BINARY(Ge, truth(x >= y))
FG_BINARY(Lt, truth(x < y))
FG_BINARY(Le, truth(x <= y))
FG_BINARY(And, truth((x != FG_ZERO) & (y != FG_ZERO)))
FG_BINARY(Or, truth((x != FG_ZERO) | (y != FG_ZERO)))
FG_BINARY(Remainder, each(remainder_of, x, y))
FG_TERNARY(MulAdd, fma(x, y, z))
FG_TERNARY(Where, select(x != FG_ZERO, y, z))

void reduce_Sum(float* dst, const float* a, const float*, const float*, int n, const float*) {
  float sum = 0.0f;
  for (int i = 0; i < n; ++i) sum += a[i];
  dst[0] = sum;
}
void reduce_Max(float* dst, const float* a, const float*, const float*, int n, const float*) {
  float best = a[0];
  for (int i = 1; i < n; ++i) best = best > a[i] || best != best ? best : a[i];
  dst[0] = best;
}
void reduce_Min(float* dst, const float* a, const float*, const float*, int n, const float*) {
  float best = a[0];
  for (int i = 1; i < n; ++i) best = best < a[i] || best != best ? best : a[i];
  dst[0] = best;
}

void add_to(float* dst, const float* a, int n) { map_Add(dst, dst, a, nullptr, n, nullptr); }

void fill_maps(MapFn* m) {
#define FG_FILL_Move(name)
#define FG_FILL_Map(name) m[k##name] = map_##name;
#define FG_FILL_Reduce(name) m[k##name] = reduce_##name;
#define FG_FUNCTION(kind, name, code, operands, cycles) FG_FILL_##kind(name)
#include "../functions.def"
#undef FG_FUNCTION
}

double peak(int64_t rounds) {
  constexpr int kChains = 10;
  Vec acc[kChains];
  FG_UNROLL for (int c = 0; c < kChains; ++c) acc[c] = splat(1.0f + c);
  Vec scale = splat(0.999f), shift = splat(0.001f);
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : "+m"(*&rounds));
    FG_UNROLL for (int c = 0; c < kChains; ++c) acc[c] = fma(acc[c], scale, shift);
  }
  Vec sum = acc[0];
  FG_UNROLL for (int c = 1; c < kChains; ++c) sum += acc[c];
  volatile float sink = sum[0];
  (void)sink;
  return 2.0 * kChains * kWidth * static_cast<double>(rounds);
}

float stream(const float* data, int64_t n) {
  Vec sum[8] = {};
  for (int64_t i = 0; i + 8 * kWidth <= n; i += 8 * kWidth)
    FG_UNROLL for (int s = 0; s < 8; ++s) sum[s] += load(data + i + s * kWidth);
  FG_UNROLL for (int s = 1; s < 8; ++s) sum[0] += sum[s];
  return sum[0][0];
}

#define FG_STRING(x) FG_STRING_OF(x)
#define FG_STRING_OF(x) #x

const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels k = {};
    k.name = FG_STRING(FG_ISA);
    k.width = kWidth;
    k.gemm_panels = kWidth == 16 ? 3 : kWidth == 8 ? 2 : 1;
    FillTiles<1, 1>::into(k);
    fill_maps(k.map);
    k.add = add_to;
    k.peak = peak;
    k.stream = stream;
    return k;
  }();
  return table;
}

}  // namespace FG_ISA
}  // namespace fastgen
