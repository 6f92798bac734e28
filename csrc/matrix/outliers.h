// Products with outliers, for any vector type `V` of 16 lanes; see planes.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "base/half.h"
#include "matrix/matrix.h"

namespace quantine {
namespace {

// Products of `count` outliers from `first` with one row of activations.
template <typename V>
inline void outlier_products(const Weights& w, std::size_t first, std::size_t count, const float* x,
                             float* out) {
  const std::uint16_t* halves = w.outlier_halves.empty() ? nullptr : &w.outlier_halves[first];
  const float* floats = w.outlier_floats.empty() ? nullptr : &w.outlier_floats[first];
  if (!w.outlier_short_columns.empty())
    return V::products(&w.outlier_short_columns[first], halves, floats, count, x, out);
  for (std::size_t e = 0; e < count; ++e)
    out[e] = x[w.outlier_columns[first + e]] * (halves ? half_to_float(halves[e]) : floats[e]);
}

constexpr std::size_t kOutlierChains = 8;  // sums of a row of weights that take turns

// Adds what outliers of a tile make of one row of activations. They lie by row, mostly one or two
// of each: a loop for each row would cost more than the products. Where rows have many, sums that
// wait for each other would.
template <typename V>
void add_outliers(const Weights& w, std::size_t tile, const float* x, float* lane) {
  constexpr std::size_t kPiece = 128, kChains = kOutlierChains;
  alignas(64) float products[kPiece];
  alignas(64) float sums[kChains][kTile] = {};
  const std::size_t end = w.outlier_offsets[tile + 1];
  for (std::size_t first = w.outlier_offsets[tile]; first < end; first += kPiece) {
    const std::size_t count = std::min(kPiece, end - first);
    outlier_products<V>(w, first, count, x, products);
    const std::uint8_t* lanes = &w.outlier_lanes[first];
    std::size_t e = 0;
    for (; e + kChains <= count; e += kChains)
      for (std::size_t c = 0; c < kChains; ++c) sums[c][lanes[e + c]] += products[e + c];
    for (std::size_t c = 0; e < count; ++e, ++c) sums[c][lanes[e]] += products[e];
  }
  typename V::Float total = V::floats(lane);
  for (const auto& sum : sums) total = V::add(total, V::floats(sum));
  V::store(lane, total);
}

// The `count` outliers from `first` as float32.
template <typename V>
void outlier_values(const Weights& w, std::size_t first, std::size_t count, float* out) {
  if (w.outlier_halves.empty()) {
    std::memcpy(out, &w.outlier_floats[first], count * sizeof(float));
  } else if (count == kTile) {
    V::store(out, V::halves(&w.outlier_halves[first]));
  } else {
    for (std::size_t e = 0; e < count; ++e) out[e] = half_to_float(w.outlier_halves[first + e]);
  }
}

// What outliers add for all rows of activations, added to `y` `[batch, rows]`, in the same order of
// sums.
template <typename V>
void add_outliers(const Weights& w, const Activations& a, std::size_t batch, std::size_t tile,
                  float* y) {
  const std::size_t first = tile * kTile, rows = std::min(kTile, w.rows - first);
  const std::size_t begin = w.outlier_offsets[tile], end = w.outlier_offsets[tile + 1];
  for (std::size_t start = 0; start < batch; start += kTile) {
    const float* x = a.turned + start * w.columns;
    float* out = y + start * w.rows + first;
    const std::size_t some = std::min(kTile, batch - start);
    std::size_t e = begin;
    for (std::size_t r = 0; r < rows; ++r, ++out) {
      typename V::Float sums[kOutlierChains];
      for (auto& sum : sums) sum = V::set(0.0f);
      for (std::size_t count = 0; e < end && w.outlier_lanes[e] == r; e += count) {
        const std::size_t most = std::min(kTile, end - e);
        for (count = 1; count < most && w.outlier_lanes[e + count] == r;) ++count;
        float values[kTile];
        outlier_values<V>(w, e, count, values);
        const auto add = [&](std::size_t i, std::size_t column) __attribute__((always_inline)) {
          auto& sum = sums[(e - begin + i) % kOutlierChains];
          sum = V::add(sum, V::mul(V::floats(x + column * kTile), V::set(values[i])));
        };
        if (w.outlier_short_columns.empty())
          for (std::size_t i = 0; i < count; ++i) add(i, w.outlier_columns[e + i]);
        else
          for (std::size_t i = 0; i < count; ++i) add(i, w.outlier_short_columns[e + i]);
      }
      if (r < a.first_lane) continue;
      float lanes[kTile] = {};
      for (std::size_t b = 0; b < some; ++b) lanes[b] = out[b * w.rows];
      typename V::Float total = V::floats(lanes);
      for (const auto& sum : sums) total = V::add(total, sum);
      V::store(lanes, total);
      for (std::size_t b = 0; b < some; ++b) out[b * w.rows] = lanes[b];
    }
  }
}

}  // namespace
}  // namespace quantine
