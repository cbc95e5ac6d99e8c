// Vectors of the instruction set this translation unit is compiled for. kernels.cpp is compiled once per set, so all
// of this lives in a namespace named after the set, and nothing here or there may instantiate a standard template:
// the linker would keep one copy for all, possibly the one that needs AVX-512.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef FG_ISA
#define FG_ISA baseline
#endif
#define FG_INLINE static inline __attribute__((always_inline))

namespace fastgen {
namespace FG_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t Int __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Half __attribute__((vector_size(2 * kWidth)));

FG_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// bfloat16 is the upper half of a float, so widening is exact.
FG_INLINE Vec load(const uint16_t* p) {
#if defined(__AVX512F__)  // the zero-masked forms: the plain ones draw false warnings from GCC 12
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<Vec>(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, half), 16));
#elif defined(__AVX2__)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vec>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#elif defined(__x86_64__)
  const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vec>(_mm_unpacklo_epi16(_mm_setzero_si128(), half));
#else
  Half half;
  std::memcpy(&half, p, sizeof half);
  return reinterpret_cast<Vec>(__builtin_convertvector(half, Int) << 16);
#endif
}

FG_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

FG_INLINE Vec splat(float x) { return x - Vec{}; }  // x - 0 is x, also for -0

FG_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

FG_INLINE Vec sqrt(Vec a) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, a);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(a);
#elif defined(__x86_64__)
  return _mm_sqrt_ps(a);
#else
  for (int i = 0; i < kWidth; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
#endif
}

}  // namespace FG_ISA
}  // namespace fastgen
