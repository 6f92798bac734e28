// The small steps between matrix products, on rows of float32. Sums are folded from a fixed number
// of lanes, so every processor and every number of threads gives the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quantine {

enum class Activation { kRelu, kSilu, kGelu, kGeluTanh };

// y = x / sqrt(mean(x^2) + eps) * weight. All are [n]; y may be x.
void rms_norm(const float* x, const float* weight, float eps, std::size_t n, float* y);

// y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias. All are [n]; y may be x.
void layer_norm(const float* x, const float* weight, const float* bias, float eps, std::size_t n,
                float* y);

// x[n] += y[n].
void add(float* x, const float* y, std::size_t n);

// x[n] *= factor.
void scale(float* x, float factor, std::size_t n);

// Rotates the pairs (x[i], x[i + half]) by the angles whose cosine and sine are cos[i], sin[i].
void rotate(float* x, const float* cos, const float* sin, std::size_t half);

// Rotates the pairs (x[2 i], x[2 i + 1]) likewise.
void rotate_neighbours(float* x, const float* cos, const float* sin, std::size_t half);

// x[n] = bound * tanh(x[n] / bound).
void cap(float* x, float bound, std::size_t n);

// x[n] = activation(x[n]).
void activate(Activation activation, float* x, std::size_t n);

// x[n] *= y[n].
void gate(float* x, const float* y, std::size_t n);

// x[n] as whole numbers within 16 bits; returns their scale, which is not a number if x is not
// finite.
float round_row(const float* x, std::size_t n, std::int16_t* codes);

// out[n] = codes[n].
void widen(const std::int16_t* codes, std::size_t n, float* out);

}  // namespace quantine
