// A tile of a group's weights, grids for it, and what they cost: for range.cpp and fit.cpp.
#pragma once

#include <vector>

#include "base/lanes.h"
#include "fit/fit.h"

namespace quantine {

// One value for each row of a tile.
struct Lanes {
  float at[kLanes];
};

struct Grids {
  Lanes scale, zero;
};

// A tile of a group's weights, copied: [n] inputs by kLanes rows, the last tile filled with zeros.
struct Tile {
  std::vector<Lanes> weights, losses;
  std::vector<float> importance;  // 1 / spread^2 of each input
  Lanes price;                    // of each row

  // Errors count in units of the spread of inputs [n], or of rows where `of_columns`: what is
  // equal for all of a row needs no division, but a price in those units.
  Tile(const Fitter& fitter, std::size_t start)
      : weights(fitter.length), losses(fitter.length), importance(fitter.length, 1.0f) {
    std::fill_n(price.at, kLanes, fitter.request.price);
    if (fitter.of_columns) return;
    for (std::size_t j = 0; j < importance.size(); ++j) {
      const float spread = fitter.spread[start + j];
      importance[j] = 1.0f / (spread * spread);
    }
  }
  void set_prices(const float* spread, float unit, std::size_t lanes) {
    for (std::size_t r = 0; r < lanes; ++r) price.at[r] = unit * (spread[r] * spread[r]);
  }
  // Copies `lanes` rows of `columns` [n, rows].
  void load(const float* columns, std::size_t rows, std::size_t lanes) {
    for (std::size_t j = 0; j < weights.size(); ++j)
      std::copy_n(columns + j * rows, lanes, weights[j].at);
  }
};

// Ranges for grids with whole zero points hold zero: the scales they need, before rounding.
QUANTINE_INLINE void whole_scales(const Lanes& low, const Lanes& high, const FitRequest& f,
                                  Lanes& scale) {
  const float top = static_cast<float>((1 << f.bits) - 1);
  const float middle = static_cast<float>(1 << (f.bits - 1)), above = top - middle;
  if (f.symmetric) {
    for (std::size_t r = 0; r < kLanes; ++r) {
      const float upper = larger(high.at[r], 0.0f) / above;
      const float lower = -smaller(low.at[r], 0.0f) / middle;
      scale.at[r] = larger(upper, lower);
    }
    return;
  }
  for (std::size_t r = 0; r < kLanes; ++r)
    scale.at[r] = (larger(high.at[r], 0.0f) - smaller(low.at[r], 0.0f)) / top;
}

// How many of its widths a range may lie from zero: quantine.kernels.fit.reference.farthest_of.
QUANTINE_INLINE float farthest_range(const FitRequest& f) {
  if (f.clip == Clip::kMinMax) return 64.0f;
  return static_cast<float>(std::exp2(std::min(f.scale_bits, f.zero_bits) / 2.0));
}

// Grids over the ranges from `low` to `high`: quantine.kernels.fit.reference.cover.
QUANTINE_INLINE void cover(const Lanes& low, const Lanes& high, const FitRequest& f, Grids& grid) {
  const float top = static_cast<float>((1 << f.bits) - 1);
  if (f.zero_bits != 0) {
    const float farthest = farthest_range(f);
    for (std::size_t r = 0; r < kLanes; ++r) {
      const float reach = larger(std::fabs(low.at[r]), std::fabs(high.at[r]));
      const bool distant = high.at[r] - low.at[r] <= reach / farthest;
      const float from = distant ? smaller(low.at[r], 0.0f) : low.at[r];
      const float to = distant ? larger(high.at[r], 0.0f) : high.at[r];
      grid.scale.at[r] = larger((to - from) / top, kSmallestHalf);
      grid.zero.at[r] = -from / grid.scale.at[r];
    }
    return;
  }
  whole_scales(low, high, f, grid.scale);
  const float middle = static_cast<float>(1 << (f.bits - 1));
  const bool symmetric = f.symmetric;
  for (std::size_t r = 0; r < kLanes; ++r) {
    const float scale = to_half(larger(grid.scale.at[r], kSmallestHalf));
    const float zero = nearest_code(-smaller(low.at[r], 0.0f) / scale, top);
    grid.scale.at[r] = scale;
    grid.zero.at[r] = symmetric ? middle : zero;
  }
}

QUANTINE_INLINE float rounding_error(float x, float scale, float inverse, float zero, float top) {
  return (nearest_code(x * inverse + zero, top) - zero) * scale - x;
}

// |error|^2.4, with the fifth root of error^2 from Newton's method.
QUANTINE_INLINE float power(float error) {
  const float square = error * error;
  const float radicand = larger(square, 1e-36f);
  union {
    float value;
    std::uint32_t bits;
  } start{radicand};
  start.bits = start.bits / 5 + 0x32cccccdu;  // a fifth of the exponent
  float root = start.value;
  for (int step = 0; step < 4; ++step) {
    const float fourth = (root * root) * (root * root);
    root = 0.8f * root + 0.2f * (radicand / fourth);
  }
  return square * root;
}

// The objective's cost of a grid for each row, added up over the inputs.
template <bool kIsPower>
QUANTINE_INLINE void add_costs(const Tile& tile, const Grids& grid, float top, Lanes& cost) {
  Lanes inverse;
  for (std::size_t r = 0; r < kLanes; ++r) {
    inverse.at[r] = 1.0f / grid.scale.at[r];
    cost.at[r] = 0.0f;
  }
  for (std::size_t j = 0; j < tile.weights.size(); ++j) {
    const float* x = tile.weights[j].at;
    const float importance = tile.importance[j];
    for (std::size_t r = 0; r < kLanes; ++r) {
      const float error =
          rounding_error(x[r], grid.scale.at[r], inverse.at[r], grid.zero.at[r], top);
      cost.at[r] += kIsPower ? power(error) : smaller(error * error * importance, tile.price.at[r]);
    }
  }
}

QUANTINE_INLINE void find_costs(const Tile& tile, const Grids& grid, const FitRequest& f,
                                Lanes& cost) {
  const float top = static_cast<float>((1 << f.bits) - 1);
  if (f.clip == Clip::kPower)
    add_costs<true>(tile, grid, top, cost);
  else
    add_costs<false>(tile, grid, top, cost);
}

// The grid over the whole range of each row, or over the share of it that costs least, put into
// `lanes` rows of `scale` and `zero`. Returns the largest scale that whole ranges need; not a
// number if a weight is none.
float fit_range(Tile& tile, const FitRequest& request, float* scale, float* zero,
                std::size_t lanes);

// Replaces likely outliers by the mean of the others:
// quantine.kernels.fit.reference.without_outliers.
void replace_outliers(Tile& tile, const FitRequest& request);

}  // namespace quantine
