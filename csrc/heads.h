// Heads: from the parameters of a step and its uniforms to the value, in the formulas and order of fastgen/heads.
//
// Parameters and values are floats; all between is double. So whatever the compiler contracts and whichever library
// gives exp and log, results agree to about 1e-15 before the one rounding at the end, and two executors take different
// decisions only where u is that close to a boundary. A draw costs tens of double operations (Categorical: one exp a
// class), which is little beside the network in front of it.
//
// Parameters that are no distribution (NaN, no finite logit, an infinite mean) give NaN in place of a value: the caller
// sees it in what was drawn. Nothing is read or written out of bounds.
#pragma once
#include <math.h>

#include <cstdint>

#include "plan.h"
#include "rng.h"

namespace fastgen {

// Uniforms that a step takes; fastgen.heads: num_uniforms.
FG_HD inline int head_uniforms(const Head& h) {
  if (h.kind == kLogisticMixture) return 1 + h.channels;
  return h.kind == kGaussianMixture ? 2 : 1;
}

// Inverse CDF: the first k with p_0 + ... + p_k > u * total, p_k = exp((logits_k - max) / temperature). The first pass
// leaves the sum at 32 marks, so that the second makes only the p between two of them again, to the same sums. -1:
// there is no distribution, as a logit is NaN or +inf, or all are -inf.
inline int32_t pick(const float* logits, int32_t n, double u, double temperature) {
  constexpr int32_t kMarks = 32;
  float most = logits[0];
  for (int32_t k = 1; k < n; ++k) most = logits[k] > most ? logits[k] : most;
  const int32_t stride = (n + kMarks - 1) / kMarks;
  double marks[kMarks];  // the sum before k = i * stride
  double sum = 0;
  for (int32_t k = 0, i = 0, next = 0; k < n; ++k) {
    if (k == next) {
      marks[i++] = sum;
      next += stride;
    }
    sum += exp((static_cast<double>(logits[k]) - most) / temperature);
  }
  if (!(sum > 0)) return -1;
  const double target = u * sum;
  int32_t i = (n - 1) / stride;
  while (i > 0 && marks[i] > target) --i;
  sum = marks[i];
  for (int32_t k = i * stride; k < n - 1; ++k) {
    sum += exp((static_cast<double>(logits[k]) - most) / temperature);
    if (sum > target) return k;
  }
  return n - 1;
}

FG_HD inline double scale_of(float log_scale, float floor, double temperature) {
  return exp(static_cast<double>(log_scale < floor ? floor : log_scale)) * temperature;
}

FG_HD inline double horner(const double* c, int n, double x) {
  double y = c[n - 1];
  for (int i = n - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

// Quantile of the standard normal distribution: algorithm AS 241, PPND16 (Wichura 1988), relative error about 1e-16.
FG_HD inline double ndtri(double p) {
  const double q = p - 0.5;
  if (fabs(q) <= 0.425) {
    const double a[] = {3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
                        1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
                        3.3430575583588128105e4, 2.5090809287301226727e3};
    const double b[] = {1.0,
                        4.2313330701600911252e1,
                        6.8718700749205790830e2,
                        5.3941960214247511077e3,
                        2.1213794301586595867e4,
                        3.9307895800092710610e4,
                        2.8729085735721942674e4,
                        5.2264952788528545610e3};
    const double r = 0.180625 - q * q;
    return q * horner(a, 8, r) / horner(b, 8, r);
  }
  double r = sqrt(-log(q < 0 ? p : 1 - p));
  double x;
  if (r <= 5) {
    const double c[] = {1.42343711074968357734e0,  4.63033784615654529590e0, 5.76949722146069140550e0,
                        3.64784832476320460504e0,  1.27045825245236838258e0, 2.41780725177450611770e-1,
                        2.27238449892691845833e-2, 7.74545014278341407640e-4};
    const double d[] = {1.0,
                        2.05319162663775882187e0,
                        1.67638483018380384940e0,
                        6.89767334985100004550e-1,
                        1.48103976427480074590e-1,
                        1.51986665636164571966e-2,
                        5.47593808499534494600e-4,
                        1.05075007164441684324e-9};
    r -= 1.6;
    x = horner(c, 8, r) / horner(d, 8, r);
  } else {  // p below 1.4e-11: not reached from 32 bits, but the function is whole
    const double e[] = {6.65790464350110377720e0,  5.46378491116411436990e0,  1.78482653991729133580e0,
                        2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
                        2.71155556874348757815e-5, 2.01033439929228813265e-7};
    const double f[] = {1.0,
                        5.99832206555887937690e-1,
                        1.36929880922735805310e-1,
                        1.48753612908506148525e-2,
                        7.86869131145613259100e-4,
                        1.84631831751005468180e-5,
                        1.42151175831644588870e-7,
                        2.04426310338993978564e-15};
    r -= 5;
    x = horner(e, 8, r) / horner(f, 8, r);
  }
  return q < 0 ? -x : x;
}

// Three channels: coefficient i of component m, from the parameters of colour i.
FG_HD inline double coefficient(const float* params, int32_t n, int32_t m, int32_t i) {
  return tanh(static_cast<double>(params[n + 3 * n * i + 2 * n + m]));
}

// PixelCNN++ (Salimans et al. 2017, eq. 1 to 3). One channel: [logits, means, log-scales] of n mixtures each; three:
// n logits, then per colour [means, log-scales, coefficients]. The mean of green gets coefficient 0 times red, that of
// blue 1 times red and 2 times green. known: values that are not drawn (NaN: drawn), or null; later colours see them.
FG_HD inline void logistic_mixture_value(const Head& h, const float* params, int32_t m, const double* u,
                                         double temperature, const float* known, float* value) {
  const int32_t n = h.n, kinds = h.channels == 1 ? 2 : 3;
  const double half = 0.5 * (h.levels - 1);
  for (int32_t c = 0; c < h.channels; ++c) {
    if (known && known[c] == known[c]) {
      value[c] = known[c];
      continue;
    }
    const float* own = params + n + c * kinds * n + (m < 0 ? 0 : m);  // mean; n further on, log-scale
    double x = own[0];
    if (c == 1) x += coefficient(params, n, m < 0 ? 0 : m, 0) * value[0];
    if (c == 2) {
      x += coefficient(params, n, m < 0 ? 0 : m, 1) * value[0];
      x += coefficient(params, n, m < 0 ? 0 : m, 2) * value[1];
    }
    const double noise = u[1 + c];
    x += scale_of(own[n], h.floor_log_scale, temperature) * (log(noise) - log1p(-noise));
    if (m < 0 || !isfinite(x)) {
      value[c] = NAN;
      continue;
    }
    x = x < -1 ? -1 : x > 1 ? 1 : x;
    if (h.levels > 0) x = rint((x + 1) * half) / half - 1;
    value[c] = static_cast<float>(x);
  }
}

// Logits of the choice that a step begins with: params[0, head_logits). 0: there is none. One Gaussian may come without
// its logit, with two parameters.
FG_HD inline int32_t head_logits(const Head& h) {
  if (h.kind == kBernoulli || (h.kind == kGaussianMixture && h.params == 2 * h.n)) return 0;
  return h.n;
}

FG_HD inline float gaussian_value(const Head& h, const float* params, int32_t m, const double* u, double temperature) {
  if (m < 0) return NAN;
  const float* own = params + head_logits(h) + m;
  const float x = static_cast<float>(own[0] + scale_of(own[h.n], h.floor_log_scale, temperature) * ndtri(u[1]));
  if (!isfinite(x)) return NAN;
  return x < h.clip_lo ? h.clip_lo : x > h.clip_hi ? h.clip_hi : x;
}

// The value of one step, m being the choice (-1: none is possible): h.channels values for LogisticMixture, else one.
// params: h.params of them; u: head_uniforms(h); temperature > 0 divides logits and multiplies scales.
FG_HD inline void head_value(const Head& h, const float* params, int32_t m, const double* u, float temperature,
                             float* value, const float* known) {
  switch (h.kind) {
    case kLogisticMixture: return logistic_mixture_value(h, params, m, u, temperature, known, value);
    case kCategorical: value[0] = m < 0 ? NAN : static_cast<float>(m); break;
    case kBernoulli:
      value[0] = params[0] != params[0]                                                ? NAN
                 : u[0] < 1 / (1 + exp(-static_cast<double>(params[0]) / temperature)) ? 1.0f
                                                                                       : 0.0f;
      break;
    case kGaussianMixture: value[0] = gaussian_value(h, params, m, u, temperature); break;
  }
  if (known && known[0] == known[0]) value[0] = known[0];
}

// Choice and value. known: values that are not drawn (NaN: drawn), or null.
inline void head_draw(const Head& h, const float* params, const double* u, float temperature, float* value,
                      const float* known = nullptr) {
  const int32_t n = head_logits(h);
  head_value(h, params, n > 0 ? pick(params, n, u[0], temperature) : 0, u, temperature, value, known);
}

}  // namespace fastgen
