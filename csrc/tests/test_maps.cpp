// The maps against the C library in double precision, at every width; the tails; the edges.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../cpu/kernels.h"
#include "../functions.h"
#include "../plan.h"
#include "check.h"

using namespace fastgen;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Distance in units in the last place of the true value; the spacing of denormals where that is larger.
double ulps(float got, double want) {
  if (std::isnan(want)) return std::isnan(got) ? 0 : 1e9;
  const float rounded = static_cast<float>(want);
  if (got == rounded) return 0;
  if (std::isinf(got) || std::isinf(rounded)) {  // one step past the largest number is no worse than one step
    const float most = std::numeric_limits<float>::max();
    return std::fabs(got) >= most && std::fabs(want) >= most * (1 - 1e-6) && (got > 0) == (want > 0) ? 1 : 1e9;
  }
  const double spacing = std::max(std::ldexp(std::fabs(want), -24), 1.401298464324817e-45);
  return std::fabs(got - want) / spacing;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

struct Function {
  const char* name;
  int fn;
  double (*truth)(double);
  double lo, hi;     // range of the random points
  double allowed;    // ulps
  double slack = 0;  // absolute error allowed besides
  float imm[3] = {0, 0, 0};
};

const Function kTable[] = {
    {"exp", kExp, std::exp, -110, 95, 3},
    {"expm1", kExpm1, std::expm1, -40, 95, 4},
    {"expm1 small", kExpm1, std::expm1, -0.5, 0.5, 4},
    {"log", kLog, std::log, 0, 100, 3},
    {"log1p", kLog1p, std::log1p, -1, 10, 4},
    {"log1p small", kLog1p, std::log1p, -0.01, 0.01, 4},
    {"tanh", kTanh, std::tanh, -12, 12, 5},
    {"tanh small", kTanh, std::tanh, -0.1, 0.1, 5},
    {"sigmoid", kSigmoid, sigmoid, -110, 110, 5},
    {"erf", kErf, std::erf, -5, 5, 4},
    {"atan", kAtan, std::atan, -50, 50, 2},
    {"erf small", kErf, std::erf, -0.01, 0.01, 4},
    {"sin", kSin, std::sin, -100, 100, 4, 2e-7},
    {"cos", kCos, std::cos, -100, 100, 4, 2e-7},
    {"sin far", kSin, std::sin, -1e6, 1e6, 4, 1e-6},
    {"sqrt", kSqrt, std::sqrt, 0, 1e6, 1},
    {"rsqrt", kRsqrt, [](double x) { return 1 / std::sqrt(x); }, 0, 1e6, 3},
    {"reciprocal", kReciprocal, [](double x) { return 1 / x; }, -10, 10, 1},
    {"silu", kSilu, [](double x) { return x * sigmoid(x); }, -80, 80, 6},
    {"gelu", kGelu, [](double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }, -6, 6, 6, 4e-7},
    {"gelu tanh", kGeluTanh,
     [](double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }, -6, 6, 8,
     8e-7},
    {"elu", kElu, [](double x) { return x > 0 ? 2 * x : 3 * std::expm1(0.5 * x); }, -10, 10, 6, 0, {1.5f, 2, 0.5f}},
    {"leaky relu", kLeakyRelu, [](double x) { return x > 0 ? x : 0.25 * x; }, -10, 10, 1, 0, {0.25f}},
    {"softplus", kSoftplus, [](double x) { return std::log1p(std::exp(2 * x)) / 2; }, -20, 9, 6, 0, {2, 20}},
    {"floor", kFloor, std::floor, -1e3, 1e3, 0},
    {"ceil", kCeil, std::ceil, -1e3, 1e3, 0},
    {"round", kRound, std::nearbyint, -1e3, 1e3, 0},
    {"trunc", kTrunc, std::trunc, -1e3, 1e3, 0},
    {"neg", kNeg, [](double x) { return -x; }, -5, 5, 0},
    {"abs", kAbs, [](double x) { return std::fabs(x); }, -5, 5, 0},
    {"relu", kRelu, [](double x) { return x > 0 ? x : 0; }, -5, 5, 0},
    {"sign", kSign, [](double x) { return double((x > 0) - (x < 0)); }, -5, 5, 0},
    {"not", kNot, [](double x) { return double(x == 0); }, -5, 5, 0},
    {"clamp", kClamp, [](double x) { return std::fmin(std::fmax(x, -1), 2); }, -5, 5, 0, 0, {-1, 2}},
    {"affine", kAffine, [](double x) { return 2 * x + 1; }, -5, 5, 1, 1e-6, {2, 1}},
    {"pow 2.5", kPowScalar, [](double x) { return std::pow(x, 2.5); }, 0, 50, 2, 0, {2.5f}},
    {"pow 3", kPowScalar, [](double x) { return x * x * x; }, -50, 50, 3, 0, {3}},
    {"pow -0.5", kPowScalar, [](double x) { return std::pow(x, -0.5); }, 0, 50, 3, 0, {-0.5f}},
    {"2 ** x", kScalarPow, [](double x) { return std::pow(2, x); }, -20, 20, 2, 0, {2}},
};

void unary(const Kernels& k) {
  std::mt19937 random(7);
  for (const Function& f : kTable) {
    std::vector<float> x(20000 + 5), y(x.size());
    std::uniform_real_distribution<float> uniform(f.lo, f.hi);
    for (float& v : x) v = uniform(random);
    k.map[f.fn](y.data(), x.data(), x.data(), x.data(), x.size(), f.imm);
    double worst = 0;
    float at = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double want = f.truth(x[i]);
      if (std::fabs(y[i] - want) <= f.slack) continue;
      if (ulps(y[i], want) > worst) worst = ulps(y[i], want), at = x[i];
    }
    CHECK(worst <= f.allowed, "%s %s: %.2f ulps at %.9g", k.name, f.name, worst, at);
    // The same value wherever the element stands, and nothing written past the end.
    for (int n = 1; n <= 40; ++n) {
      std::vector<float> part(n + 1, 123.0f);
      k.map[f.fn](part.data(), x.data() + 3, x.data() + 3, x.data() + 3, n, f.imm);
      CHECK(std::memcmp(part.data(), y.data() + 3, n * sizeof(float)) == 0, "%s %s: first %d elements", k.name, f.name,
            n);
      CHECK(part[n] == 123.0f, "%s %s: wrote past %d elements", k.name, f.name, n);
    }
  }
}

void edges(const Kernels& k) {
  const float tiny = 1e-42f, most = std::numeric_limits<float>::max();
  struct Edge {
    int fn;
    float x, want;
  };
  const Edge table[] = {
      {kExp, kInf, kInf},
      {kExp, -kInf, 0},
      {kExp, kNan, kNan},
      {kExp, 0, 1},
      {kExp, -100, 3.7835e-44f},
      {kExp, 88.72f, 3.3932e38f},
      {kExp, 89, kInf},
      {kExpm1, kInf, kInf},
      {kExpm1, -kInf, -1},
      {kExpm1, kNan, kNan},
      {kExpm1, tiny, tiny},
      {kExpm1, 88.72f, 3.3932e38f},
      {kExpm1, -0.0f, -0.0f},
      {kLog, 0, -kInf},
      {kLog, -1, kNan},
      {kLog, kInf, kInf},
      {kLog, kNan, kNan},
      {kLog, 1, 0},
      {kLog, tiny, std::log(tiny)},
      {kLog, -kInf, kNan},
      {kLog1p, -1, -kInf},
      {kLog1p, -2, kNan},
      {kLog1p, kInf, kInf},
      {kLog1p, kNan, kNan},
      {kLog1p, tiny, tiny},
      {kLog1p, -0.0f, -0.0f},
      {kTanh, kInf, 1},
      {kTanh, -kInf, -1},
      {kTanh, kNan, kNan},
      {kTanh, tiny, tiny},
      {kTanh, -0.0f, -0.0f},
      {kTanh, 50, 1},
      {kSigmoid, kInf, 1},
      {kSigmoid, -kInf, 0},
      {kSigmoid, kNan, kNan},
      {kSigmoid, -100, 3.7835e-44f},
      {kErf, kInf, 1},
      {kErf, -kInf, -1},
      {kErf, kNan, kNan},
      {kErf, -6, -1},
      {kSin, kInf, kNan},
      {kCos, kNan, kNan},
      {kSin, 0, 0},
      {kCos, 0, 1},
      {kRelu, kNan, kNan},
      {kRelu, -kInf, 0},
      {kClamp, kNan, kNan},
      {kClamp, kInf, 2},
      {kFloor, -0.5f, -1},
      {kFloor, 3e9f, 3e9f},
      {kFloor, kNan, kNan},
      {kFloor, -kInf, -kInf},
      {kCeil, -0.5f, -0.0f},
      {kRound, 2.5f, 2},
      {kRound, 3.5f, 4},
      {kRound, -0.4f, -0.0f},
      {kRound, 8388609, 8388609},
      {kTrunc, -1.9f, -1},
      {kTrunc, kInf, kInf},
      {kSqrt, -1, kNan},
      {kReciprocal, 0, kInf},
      {kRsqrt, 0, kInf},
      {kSign, kNan, 0},
      {kAbs, -kInf, kInf},
      {kNot, kNan, 0},
      {kNeg, 0, -0.0f},
      {kFloor, 0.99999994f, 0},
      {kExp, most, kInf},
  };
  const float imm[3] = {-1, 2, 0};
  for (const Edge& e : table) {
    float y;
    k.map[e.fn](&y, &e.x, &e.x, &e.x, 1, imm);
    const bool close =
        std::isnan(e.want) ? std::isnan(y) : y == e.want || std::fabs(y - e.want) <= 2e-4f * std::fabs(e.want);
    CHECK(close && (e.want != 0 || std::signbit(y) == std::signbit(e.want)), "%s fn %d(%g) = %g, expected %g", k.name,
          e.fn, e.x, y, e.want);
  }
}

void several_operands(const Kernels& k) {
  const float a[] = {5.5f, -5.5f, 5.5f, -5.5f, 0, 3, kNan, 2, 6, -6};
  const float b[] = {3, 3, -3, -3, 2, 0, 1, kNan, 3, 3};
  const float c[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  const auto check = [&](int fn, std::vector<float> want) {
    float y[10];
    k.map[fn](y, a, b, c, 10, nullptr);
    for (int i = 0; i < 10; ++i)
      CHECK(y[i] == want[i] || (std::isnan(y[i]) && std::isnan(want[i])), "%s fn %d [%d] = %g, expected %g", k.name, fn,
            i, y[i], want[i]);
  };
  check(kAdd, {8.5f, -2.5f, 2.5f, -8.5f, 2, 3, kNan, kNan, 9, -3});
  check(kSub, {2.5f, -8.5f, 8.5f, -2.5f, -2, 3, kNan, kNan, 3, -9});
  check(kMul, {16.5f, -16.5f, -16.5f, 16.5f, 0, 0, kNan, kNan, 18, -18});
  check(kDiv, {5.5f / 3, -5.5f / 3, -5.5f / 3, 5.5f / 3, 0, kInf, kNan, kNan, 2, -2});
  check(kMaximum, {5.5f, 3, 5.5f, -3, 2, 3, kNan, kNan, 6, 3});
  check(kMinimum, {3, -5.5f, -3, -5.5f, 0, 0, kNan, kNan, 3, -6});
  check(kRemainder, {2.5f, 0.5f, -0.5f, -2.5f, 0, kNan, kNan, kNan, 0, 0});  // sign of b, as in Python
  check(kEq, {0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
  check(kNe, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1});
  check(kGt, {1, 0, 1, 0, 0, 1, 0, 0, 1, 0});
  check(kGe, {1, 0, 1, 0, 0, 1, 0, 0, 1, 0});
  check(kLt, {0, 1, 0, 1, 1, 0, 0, 0, 0, 1});
  check(kLe, {0, 1, 0, 1, 1, 0, 0, 0, 0, 1});
  check(kAnd, {1, 1, 1, 1, 0, 0, 1, 1, 1, 1});
  check(kOr, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1});
  check(kMulAdd, {17.5f, -14.5f, -13.5f, 20.5f, 5, 6, kNan, kNan, 27, -8});
  check(kWhere, {3, 3, -3, -3, 5, 0, 1, kNan, 3, 3});
  check(kPow, {std::pow(5.5f, 3.0f), std::pow(-5.5f, 3.0f), std::pow(5.5f, -3.0f), std::pow(-5.5f, -3.0f), 0, 1, kNan,
               kNan, 216, -216});
  float y;
  k.map[kSum](&y, c, c, c, 10, nullptr);
  CHECK(y == 55, "%s sum %g", k.name, y);
  k.map[kMax](&y, a, a, a, 6, nullptr);
  CHECK(y == 5.5f, "%s max %g", k.name, y);
  k.map[kMin](&y, a, a, a, 6, nullptr);
  CHECK(y == -5.5f, "%s min %g", k.name, y);
  k.map[kMax](&y, a, a, a, 10, nullptr);
  CHECK(std::isnan(y), "%s max with NaN %g", k.name, y);
}

// The widths with fused multiply-add agree to the bit.
void widths_agree() {
  std::vector<const Kernels*> fused;
  for (const std::string& isa : supported_isas())
    if (isa != "baseline") fused.push_back(&kernels_for(isa));
  std::mt19937 random(9);
  std::normal_distribution<float> normal(0, 4);
  std::vector<float> x(1001), y(x.size()), z(x.size());
  for (float& v : x) v = normal(random);
  const float imm[3] = {1.5f, 2.5f, 0.5f};
  for (size_t i = 1; i < fused.size(); ++i)
    for (int fn = 0; fn < fastgen::kFunctions; ++fn) {
      if (!fused[0]->map[fn]) continue;
      fused[0]->map[fn](y.data(), x.data(), x.data(), x.data(), x.size(), imm);
      fused[i]->map[fn](z.data(), x.data(), x.data(), x.data(), x.size(), imm);
      const size_t n = fastgen::function_kind(fn) == fastgen::FunctionKind::Reduce ? 1 : x.size();
      CHECK(std::memcmp(y.data(), z.data(), n * sizeof(float)) == 0, "fn %d on %s", fn, fused[i]->name);
    }
}

}  // namespace

int main() {
  for (const std::string& isa : supported_isas()) {
    const Kernels& k = kernels_for(isa);
    unary(k);
    edges(k);
    several_operands(k);
  }
  widths_agree();
  return report("test_maps");
}
