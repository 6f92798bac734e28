// What loops over rows share: copies of a loop for each instruction set, and rounding. They are
// plain C++: compilers vectorize them, once for each instruction set. Every operation is of one row
// and rounds once, so all sets find the same.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__)
#define QUANTINE_HAS_CLONES
#define QUANTINE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#define QUANTINE_INLINE inline __attribute__((always_inline))
#else
#define QUANTINE_CLONES
#define QUANTINE_INLINE inline
#endif

namespace quantine {

constexpr std::size_t kLanes = 32;         // rows that are worked on together
constexpr float kLargestHalf = 65504.0f;   // largest finite float16
constexpr float kSmallestHalf = 5.9604644775390625e-08f;  // 2^-24, smallest positive float16
constexpr float kSmallestDivisor = 1e-9f;  // for scales that a second grid rounded to 0 or below

// std::min and std::max by value: references keep loops from being vectorized.
QUANTINE_INLINE float smaller(float a, float b) { return b < a ? b : a; }
QUANTINE_INLINE float larger(float a, float b) { return a < b ? b : a; }

// The whole number nearest to `x`, to even on ties, within 0..`top`, which is at most 255.
QUANTINE_INLINE float nearest_code(float x, float top) {
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: float32 has no fractions there
  return (smaller(larger(0.0f, x), top) + kWhole) - kWhole;
}

// `x` rounded to float16, to even on ties; exact for what float16 holds, subnormal or not. What is
// too large becomes larger than kLargestHalf.
QUANTINE_INLINE float to_half(float x) {
  // Adding and subtracting a power of two leaves the wanted number of bits.
  const float magnitude = std::fabs(x);
  const float exponent = larger(magnitude, 6.103515625e-05f);
  union {
    float value;
    std::uint32_t bits;
  } unit{exponent};
  unit.bits &= 0x7f800000u;                         // the power of two at or below
  const float shift = unit.value * 8192.0f * 1.5f;  // 2^13: float32 has 13 bits more
  const float rounded = (magnitude + shift) - shift;
  return std::copysign(rounded, x);
}

}  // namespace quantine
