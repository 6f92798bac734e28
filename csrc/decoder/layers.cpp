// The same steps as loops that compilers vectorize, most with a copy for each instruction set.
#include "decoder/layers.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "base/vector_math.h"

namespace quantine {
namespace {

QUANTINE_CLONES
void relu(float* x, std::size_t n) {
  for (std::size_t j = 0; j < n; ++j) x[j] = x[j] < 0.0f ? 0.0f : x[j];
}

// e^x of what is above this is as of 88.3, but 1 / (1 + e^x) is 0.
constexpr float kFar = 88.3f;

// x / (1 + e^-u), which is NaN where x is -inf and u is as small.
QUANTINE_INLINE float gated(float x, float u) {
  return u < -kFar ? x * 0.0f : x / (1.0f + exponential(-u));
}

QUANTINE_CLONES
void silu(float* x, std::size_t n) {
  for (std::size_t j = 0; j < n; ++j) x[j] = gated(x[j], x[j]);
}

// erf does not vectorize, and few models use this variant.
void gelu(float* x, std::size_t n) {
  for (std::size_t j = 0; j < n; ++j) x[j] *= 0.5f * std::erfc(x[j] * -0.70710678f);
}

QUANTINE_CLONES
void gelu_tanh(float* x, std::size_t n) {
  // (1 + tanh u) / 2 is 1 / (1 + e^-2u).
  for (std::size_t j = 0; j < n; ++j) {
    const float twice = 1.59576912f * (x[j] + 0.044715f * x[j] * x[j] * x[j]);
    x[j] = gated(x[j], twice);
  }
}

}  // namespace

QUANTINE_CLONES
void rms_norm(const float* x, const float* weight, float eps, std::size_t n, float* y) {
  const float squares = sum_of(n, [x](std::size_t j) { return x[j] * x[j]; });
  const float factor = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  for (std::size_t j = 0; j < n; ++j) y[j] = x[j] * factor * weight[j];
}

QUANTINE_CLONES
void layer_norm(const float* x, const float* weight, const float* bias, float eps, std::size_t n,
                float* y) {
  const float mean = sum_of(n, [x](std::size_t j) { return x[j]; }) / static_cast<float>(n);
  const float squares =
      sum_of(n, [x, mean](std::size_t j) { return (x[j] - mean) * (x[j] - mean); });
  const float factor = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  for (std::size_t j = 0; j < n; ++j) y[j] = (x[j] - mean) * factor * weight[j] + bias[j];
}

QUANTINE_CLONES
void add(float* x, const float* y, std::size_t n) {
  for (std::size_t j = 0; j < n; ++j) x[j] += y[j];
}

QUANTINE_CLONES
void scale(float* x, float factor, std::size_t n) {
  for (std::size_t j = 0; j < n; ++j) x[j] *= factor;
}

QUANTINE_CLONES
void rotate(float* x, const float* cos, const float* sin, std::size_t half) {
  for (std::size_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

QUANTINE_CLONES
void rotate_neighbours(float* x, const float* cos, const float* sin, std::size_t half) {
  for (std::size_t i = 0; i < half; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cos[i] - b * sin[i];
    x[2 * i + 1] = b * cos[i] + a * sin[i];
  }
}

QUANTINE_CLONES
void cap(float* x, float bound, std::size_t n) {
  for (std::size_t j = 0; j < n; ++j) x[j] = capped(x[j], bound);
}

QUANTINE_CLONES
void gate(float* x, const float* y, std::size_t n) {
  for (std::size_t j = 0; j < n; ++j) x[j] *= y[j];
}

void activate(Activation activation, float* x, std::size_t n) {
  switch (activation) {
    case Activation::kRelu:
      return relu(x, n);
    case Activation::kSilu:
      return silu(x, n);
    case Activation::kGelu:
      return gelu(x, n);
    case Activation::kGeluTanh:
      return gelu_tanh(x, n);
  }
}

QUANTINE_CLONES
float round_row(const float* x, std::size_t n, std::int16_t* codes) {
  constexpr float kTop = 32767.0f;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
  std::int32_t bits = 0;  // of the largest magnitude; they compare as floats do, NaN above all
  for (std::size_t i = 0; i < n; ++i) {
    std::int32_t held;
    std::memcpy(&held, &x[i], sizeof held);
    held &= 0x7fffffff;
    bits = held > bits ? held : bits;
  }
  float widest;
  std::memcpy(&widest, &bits, sizeof widest);
  const bool finite = widest <= std::numeric_limits<float>::max();
  // Below this the reciprocal overflows.
  const float inverse = finite && widest > 1e-33f ? kTop / widest : 0.0f;
  for (std::size_t i = 0; i < n; ++i) {
    const float bounded = finite ? x[i] * inverse : 0.0f;
    codes[i] = static_cast<std::int16_t>(static_cast<std::int32_t>((bounded + kShift) - kShift));
  }
  return finite ? widest / kTop : std::numeric_limits<float>::quiet_NaN();
}

QUANTINE_CLONES
void widen(const std::int16_t* codes, std::size_t n, float* out) {
  for (std::size_t i = 0; i < n; ++i) out[i] = static_cast<float>(codes[i]);
}

}  // namespace quantine
