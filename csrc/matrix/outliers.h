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
static_assert(kTile % kOutlierChains == 0);

// Adds what outliers of a tile make of one row of activations. They lie by row, mostly one or two
// of each: a loop for each row would cost more than the products. Where rows have many, sums that
// wait for each other would.
template <typename V>
void add_outliers(const Weights& w, std::size_t tile, const float* x, float* lane) {
  constexpr std::size_t kPiece = 128, kChains = kOutlierChains;
  alignas(64) float products[kPiece];
  alignas(64) float sums[kChains][kTile] = {};
  const std::size_t begin = w.outlier_offsets[tile], end = w.outlier_offsets[tile + 1];
  if (begin == end) return;
  for (std::size_t first = begin; first < end; first += kPiece) {
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
// sums. A tile has few outliers in each of its rows, so sums of all rows wait in memory for theirs.
template <typename V>
void add_outliers(const Weights& w, const Activations& a, std::size_t batch, std::size_t tile,
                  float* y) {
  const std::size_t first = tile * kTile, rows = std::min(kTile, w.rows - first);
  const std::size_t begin = w.outlier_offsets[tile], end = w.outlier_offsets[tile + 1];
  if (begin == end) return;
  for (std::size_t start = 0; start < batch; start += kTile) {
    const float* x = a.turned + start * w.columns;
    float* out = y + start * w.rows + first;
    const std::size_t some = std::min(kTile, batch - start);
    alignas(64) float totals[kTile][kTile] = {};
    alignas(64) float sums[kOutlierChains][kTile][kTile] = {};
    for (std::size_t b = 0; b < some; ++b)
      for (std::size_t r = a.first_lane; r < rows; ++r) totals[r][b] = out[b * w.rows + r];
    for (std::size_t e = begin; e < end; e += kTile) {
      const std::size_t count = std::min(kTile, end - e);
      float values[kTile];
      outlier_values<V>(w, e, count, values);
      const auto add = [&](std::size_t i, std::size_t column) __attribute__((always_inline)) {
        float* sum = sums[i % kOutlierChains][w.outlier_lanes[e + i]];
        const auto product = V::mul(V::floats(x + column * kTile), V::set(values[i]));
        V::store(sum, V::add(V::floats(sum), product));
      };
      if (w.outlier_short_columns.empty())
        for (std::size_t i = 0; i < count; ++i) add(i, w.outlier_columns[e + i]);
      else
        for (std::size_t i = 0; i < count; ++i) add(i, w.outlier_short_columns[e + i]);
    }
    for (std::size_t r = a.first_lane; r < rows; ++r) {
      typename V::Float total = V::floats(totals[r]);
      for (const auto& sum : sums) total = V::add(total, V::floats(sum[r]));
      V::store(totals[r], total);
    }
    for (std::size_t b = 0; b < some; ++b)
      for (std::size_t r = a.first_lane; r < rows; ++r) out[b * w.rows + r] = totals[r][b];
  }
}

}  // namespace
}  // namespace quantine
