// Float16 and bfloat16, bit by bit, for any processor. The functions are static: each file of an
// instruction set has its own copies.
#pragma once

#include <cstdint>
#include <cstring>

namespace quantine {

// The float16 with these bits; exact.
static inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t exponent = (half >> 10) & 0x1fu, fraction = half & 0x3ffu;
  std::uint32_t bits;
  float value;
  if (exponent == 0) {  // zero and subnormal: a multiple of 2^-24
    value = static_cast<float>(fraction) * 5.9604644775390625e-08f;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
  } else {
    bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (fraction << 13);
  }
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// `value` rounded to bfloat16, to even on ties; NaN stays NaN.
static inline std::uint16_t float_to_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace quantine
