// Vector mathematics: the maps of a vector program, a few units in the last place from the true value, with infinities,
// NaN and denormals as in torch. Each is one fixed sequence of IEEE operations on its element alone, so a value depends
// neither on its place in the vector nor (given fused multiply-add) on the width. Polynomials are minimax fits.
#pragma once
#include <cmath>

#include "simd.h"

namespace fastgen {
namespace FG_ISA {

constexpr float kInf = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");

FG_INLINE Int bits(Vec a) { return reinterpret_cast<Int>(a); }
FG_INLINE Vec real(Int a) { return reinterpret_cast<Vec>(a); }
FG_INLINE Vec select(Int mask, Vec yes, Vec no) { return mask ? yes : no; }
FG_INLINE Vec truth(Int mask) { return real(mask & bits(splat(1.0f))); }
FG_INLINE Vec abs(Vec a) { return real(bits(a) & 0x7fffffff); }
FG_INLINE Vec with_sign(Vec magnitude, Vec sign) {
  return real((bits(magnitude) & 0x7fffffff) | (bits(sign) & INT32_MIN));
}

// NaN passes through, as in torch.maximum and torch.clamp.
FG_INLINE Vec maximum(Vec a, Vec b) { return select((a > b) | (a != a), a, b); }
FG_INLINE Vec minimum(Vec a, Vec b) { return select((a < b) | (a != a), a, b); }
FG_INLINE Vec clamp(Vec a, float lo, float hi) {
  a = select(a < splat(lo), splat(lo), a);
  return select(a > splat(hi), splat(hi), a);
}

// To the nearest integer, ties to even: adding 2^23 leaves no fraction bits. Larger values are integers already.
FG_INLINE Vec round_even(Vec a) {
  const Vec big = with_sign(splat(8388608.0f), a);
  return select(abs(a) < splat(8388608.0f), with_sign((a + big) - big, a), a);
}
FG_INLINE Vec floor(Vec a) {
  const Vec r = round_even(a);
  return with_sign(r - truth(r > a), a);
}
FG_INLINE Vec ceil(Vec a) {
  const Vec r = round_even(a);
  return with_sign(r + truth(r < a), a);
}
FG_INLINE Vec trunc(Vec a) { return with_sign(floor(abs(a)), a); }

template <int N>
FG_INLINE Vec polynomial(Vec x, const float (&c)[N]) {
  Vec y = splat(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) y = fma(y, x, splat(c[i]));
  return y;
}

constexpr float kLn2High = 0.693359375f;  // few bits, so that its product with an exponent is exact
constexpr float kLn2Low = -2.12194440e-4f;
constexpr float kLog2e = 1.44269504089f;

FG_INLINE Vec power_of_two(Int n) { return real((n + 127) << 23); }  // -127 < n < 128

// x = n ln 2 + r with |r| <= ln 2 / 2; returns e^r - 1.
FG_INLINE Vec reduced_expm1(Vec x, Int* n) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: the low bits of the sum are the rounded integer
  const Vec shifted = fma(x, splat(kLog2e), magic);
  const Vec whole = shifted - magic;
  *n = bits(shifted) - bits(magic);
  Vec r = fma(whole, splat(-kLn2High), x);
  r = fma(whole, splat(-kLn2Low), r);
  static constexpr float c[] = {5.000000000e-01f, 1.666651219e-01f, 4.166618735e-02f, 8.369598538e-03f,
                                1.395171974e-03f};
  return fma(r * r, polynomial(r, c), r);
}

FG_INLINE Vec exp(Vec x) {
  Int n;
  const Vec y = reduced_expm1(clamp(x, -104.0f, 89.0f), &n) + splat(1.0f);
  const Int half = n >> 1;  // in two steps, so that 2^128 and denormal results come out right
  return y * power_of_two(half) * power_of_two(n - half);
}

FG_INLINE Vec expm1(Vec x) {
  Int n;
  const Vec y = reduced_expm1(clamp(x, -30.0f, 89.0f), &n);
  const Vec half = power_of_two(n - 1);
  const Vec z = fma(half, y, half - splat(0.5f));
  return select(x == splat(0.0f), x, z + z);
}

FG_INLINE Vec log(Vec x) {
  const Int tiny = x < splat(1.17549435e-38f);
  const Vec scaled = select(tiny, x * splat(8388608.0f), x);
  const Int e = (bits(scaled) - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const Vec f = real(bits(scaled) - (e << 23)) - splat(1.0f);
  const Vec exponent = __builtin_convertvector(e, Vec) - select(tiny, splat(23.0f), splat(0.0f));
  static constexpr float c[] = {3.333331048e-01f,  -2.499998659e-01f, 2.000222653e-01f,
                                -1.666924953e-01f, 1.421865523e-01f,  -1.238436997e-01f,
                                1.187301651e-01f,  -1.178969517e-01f, 6.915146858e-02f};
  const Vec square = f * f;
  Vec y = polynomial(f, c) * f * square;
  y = fma(exponent, splat(kLn2Low), y);
  y = fma(square, splat(-0.5f), y);
  y = fma(exponent, splat(kLn2High), f + y);
  y = select(x < splat(kInf), y, x);  // inf and NaN
  y = select(x == splat(0.0f), splat(-kInf), y);
  return select(x < splat(0.0f), splat(kNaN), y);
}

FG_INLINE Vec log1p(Vec x) {
  const Vec u = x + splat(1.0f);
  const Vec lost = x - (u - splat(1.0f));  // what rounding took from u
  const Vec y = log(u) + lost / u;
  const Int plain = (u > splat(0.0f)) & (u < splat(kInf));
  return select(abs(x) < splat(1e-8f), x, select(plain, y, log(u)));
}

FG_INLINE Vec tanh(Vec x) {
  const Vec a = abs(x);
  const Vec e = expm1(select(a > splat(15.0f), splat(30.0f), a + a));
  return with_sign(e / (e + splat(2.0f)), x);
}

FG_INLINE Vec sigmoid(Vec x) {
  const Vec e = exp(-abs(x));
  const Vec y = splat(1.0f) / (splat(1.0f) + e);
  return select(x < splat(0.0f), e * y, y);
}

FG_INLINE Vec erf(Vec x) {
  const Vec a = abs(x);
  static constexpr float small[] = {1.283791661e-01f, -3.761263490e-01f, 1.128370911e-01f, -2.686002664e-02f,
                                    5.202341825e-03f, -8.155167452e-04f, 8.414137119e-05f};
  static constexpr float large[] = {-1.705510076e-04f, 1.129495144e+00f, 6.333866715e-01f,  1.082366034e-01f,
                                    -2.509148791e-02f, 4.160523415e-03f, -4.323021858e-04f, 2.090948146e-05f};
  const Vec near = fma(x, polynomial(x * x, small), x);
  const Vec capped = select(a > splat(4.0f), splat(4.0f), a);
  const Vec far = with_sign(splat(1.0f) - exp(-polynomial(capped, large)), x);  // 1 - erfc
  return select(a < splat(0.92f), near, far);
}

// sin (quadrant 0) or cos (quadrant 1). Beyond 8192 the reduction loses digits: there the C library does it.
FG_INLINE Vec sine(Vec x, int quadrant) {
  const Vec a = select(abs(x) <= splat(8192.0f), x, splat(0.0f));
  const Vec magic = splat(12582912.0f);
  const Vec shifted = fma(a, splat(0.636619772f), magic);
  const Vec whole = shifted - magic;
  const Int n = bits(shifted) - bits(magic) + quadrant;
  Vec r = fma(whole, splat(-1.5703125f), a);  // pi / 2 in parts of 8, 11, 11 and 24 bits: all but the last exact
  r = fma(whole, splat(-4.837512969970703125e-4f), r);
  r = fma(whole, splat(-7.54953362047672271728515625e-8f), r);
  r = fma(whole, splat(-2.56334406825708960298e-12f), r);
  const Vec square = r * r;
  static constexpr float s[] = {-1.666665375e-01f, 8.332131431e-03f, -1.951083977e-04f};
  static constexpr float c[] = {4.166664556e-02f, -1.388730598e-03f, 2.443120502e-05f};
  const Vec sin = fma(r * square, polynomial(square, s), r);
  const Vec cos = fma(square * square, polynomial(square, c), fma(square, splat(-0.5f), splat(1.0f)));
  Vec y = select((n & 1) != 0, cos, sin);
  y = real(bits(y) ^ ((n & 2) << 30));
  for (int i = 0; i < kWidth; ++i)
    if (!(abs(x)[i] <= 8192.0f)) y[i] = quadrant ? ::cosf(x[i]) : ::sinf(x[i]);
  return y;
}

FG_INLINE Vec gelu(Vec x) { return splat(0.5f) * x * (splat(1.0f) + erf(x * splat(0.707106781f))); }

FG_INLINE Vec gelu_tanh(Vec x) {
  const Vec inner = splat(0.797884561f) * fma(x * x * x, splat(0.044715f), x);
  return splat(0.5f) * x * (splat(1.0f) + tanh(inner));
}

FG_INLINE Vec sign(Vec x) { return truth(x > splat(0.0f)) - truth(x < splat(0.0f)); }

// One element each: exact range reduction is a loop, and the C library's is correct.
FG_INLINE float remainder_of(float a, float b) {
  const float r = ::fmodf(a, b);
  return r != 0.0f && (b < 0.0f) != (r < 0.0f) ? r + b : r;
}

FG_INLINE Vec each(float (*fn)(float), Vec a) {
  for (int i = 0; i < kWidth; ++i) a[i] = fn(a[i]);
  return a;
}

FG_INLINE Vec each(float (*fn)(float, float), Vec a, Vec b) {
  Vec y = a;
  for (int i = 0; i < kWidth; ++i) y[i] = fn(a[i], b[i]);
  return y;
}

// torch.pow with a scalar exponent takes these as products, roots and quotients.
FG_INLINE Vec power(Vec a, float exponent) {
  if (exponent == 2.0f) return a * a;
  if (exponent == 3.0f) return a * a * a;
  if (exponent == 0.5f) return sqrt(a);
  if (exponent == -0.5f) return splat(1.0f) / sqrt(a);
  if (exponent == -1.0f) return splat(1.0f) / a;
  if (exponent == -2.0f) return splat(1.0f) / (a * a);
  return each(::powf, a, splat(exponent));
}

}  // namespace FG_ISA
}  // namespace fastgen
