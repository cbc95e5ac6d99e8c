// 16-bit floats on the host: rounding to nearest even and back, as the GPU's conversions do.
#pragma once
#include <cstdint>
#include <cstring>

namespace fastgen::team {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bfloat16(uint16_t h) { return float_of(uint32_t{h} << 16); }

inline uint16_t to_float16(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000;
  const float size = x < 0 ? -x : x;
  if (x != x) return 0x7fff;
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  // Adding 2^e * 2^13 (2^-24 * 2^23 below the normal range) rounds off the bits that a half does not have.
  uint32_t exponent = bits & 0x7f800000u;
  if (exponent < 0x38800000u) exponent = 0x38800000u;  // 2^-14
  const float magic = float_of(exponent + 0x06800000u);
  volatile float shifted = size + magic;  // volatile: no compiler may see through it
  const float rounded = shifted - magic;
  const uint32_t r = bits_of(rounded);
  if (r < 0x38800000u) return static_cast<uint16_t>(sign | static_cast<uint32_t>(rounded * 16777216.0f));
  return static_cast<uint16_t>(sign | (r - 0x38000000u) >> 13);
}

inline float from_float16(uint16_t h) {
  const uint32_t sign = uint32_t{h} << 16 & 0x80000000u, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) {
    const float size = static_cast<float>(mantissa) * (1.0f / 16777216.0f);
    return sign ? -size : size;
  }
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

}  // namespace fastgen::team
