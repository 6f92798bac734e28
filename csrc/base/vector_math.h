// For loops that compilers vectorize: exp, and sums over a fixed number of lanes.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/lanes.h"

namespace quantine {

constexpr std::size_t kSumLanes = 32;

// e^x to about 2e-7 relative; 0 below -87.3 (where float32 becomes subnormal), as x = 88.3 above.
QUANTINE_INLINE float exponential(float x) {
  constexpr float kLowest = -87.33654f, kHighest = 88.3f;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
  const float top = x > kHighest ? kHighest : x;
  const float bounded = top > kLowest ? top : kLowest;  // NaN, too: it has no whole power
  const float power = (bounded * 1.44269504f + kShift) - kShift;
  // ln 2 in two parts, the first short enough for its product to be exact.
  const float rest = (bounded - power * 0.693359375f) + power * 2.12194440e-4f;
  float series = 1.9875691500e-4f;
  series = series * rest + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  const float fraction = series * rest * rest + rest + 1.0f;
  const auto exponent = static_cast<std::uint32_t>(static_cast<std::int32_t>(power) + 127);
  const std::uint32_t bits = exponent << 23;
  float whole;
  std::memcpy(&whole, &bits, sizeof whole);
  return x < kLowest ? 0.0f : x != x ? x : fraction * whole;
}

// bound * tanh(x / bound), to about 2e-7 of the bound.
QUANTINE_INLINE float capped(float x, float bound) {
  const float decay = exponential(-2.0f * std::fabs(x / bound));
  return std::copysign(bound * ((1.0f - decay) / (1.0f + decay)), x);
}

QUANTINE_INLINE float fold(float (&lanes)[kSumLanes]) {
  for (std::size_t half = kSumLanes / 2; half > 0; half /= 2)
    for (std::size_t r = 0; r < half; ++r) lanes[r] += lanes[r + half];
  return lanes[0];
}

// Sum of term(j) for j below n.
template <typename Term>
QUANTINE_INLINE float sum_of(std::size_t n, Term term) {
  float lanes[kSumLanes] = {};
  std::size_t j = 0;
  for (; j + kSumLanes <= n; j += kSumLanes)
    for (std::size_t r = 0; r < kSumLanes; ++r) lanes[r] += term(j + r);
  for (std::size_t r = 0; j < n; ++j, ++r) lanes[r] += term(j);
  return fold(lanes);
}

}  // namespace quantine
