// The range of a group's grid: the whole one, or the share of it that costs least, with likely
// outliers left out. tile.h says what is found here.
#include <limits>

#include "fit/tile.h"

namespace quantine {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kShrinks = 21;  // shares of a range that are tried: 1, 0.975, ... 0.5

// The ends of a tile's ranges, the next inner ones, and which inputs are the ends.
struct Ends {
  Lanes low, high, next_low, next_high, at_low, at_high;
  Lanes poison;  // zero, or NaN where a weight is not finite
};

QUANTINE_INLINE void find_ends(const Tile& tile, Ends& ends) {
  for (std::size_t r = 0; r < kLanes; ++r) {
    ends.low.at[r] = ends.next_low.at[r] = kInfinity;
    ends.high.at[r] = ends.next_high.at[r] = -kInfinity;
    ends.at_low.at[r] = ends.at_high.at[r] = ends.poison.at[r] = 0.0f;
  }
  for (std::size_t j = 0; j < tile.weights.size(); ++j) {
    const float index = static_cast<float>(j);
    for (std::size_t r = 0; r < kLanes; ++r) {
      const float x = tile.weights[j].at[r];
      const bool below = x < ends.low.at[r], above = x >= ends.high.at[r];
      ends.poison.at[r] += x * 0.0f;
      ends.next_low.at[r] = below ? ends.low.at[r] : smaller(ends.next_low.at[r], x);
      ends.next_high.at[r] = above ? ends.high.at[r] : larger(ends.next_high.at[r], x);
      ends.low.at[r] = below ? x : ends.low.at[r];
      ends.high.at[r] = above ? x : ends.high.at[r];
      ends.at_low.at[r] = below ? index : ends.at_low.at[r];
      ends.at_high.at[r] = above ? index : ends.at_high.at[r];
    }
  }
}

// What leaving out each row's smallest and largest weight saves; every weight's loss on the way.
QUANTINE_INLINE void find_savings(Tile& tile, const Ends& ends, const FitRequest& f,
                                  Lanes& saved_low, Lanes& saved_high) {
  const float top = static_cast<float>((1 << f.bits) - 1);
  Grids grids[3];
  cover(ends.low, ends.high, f, grids[0]);
  cover(ends.next_low, ends.high, f, grids[1]);
  cover(ends.low, ends.next_high, f, grids[2]);
  Lanes inverse[3];
  for (int k = 0; k < 3; ++k)
    for (std::size_t r = 0; r < kLanes; ++r) inverse[k].at[r] = 1.0f / grids[k].scale.at[r];
  const auto loss = [&](int k, std::size_t r, float x, float importance) {
    const float error = rounding_error(x, grids[k].scale.at[r], inverse[k].at[r],
                                       grids[k].zero.at[r], top);
    return error * error * importance;
  };
  Lanes whole{}, above{}, below{};
  for (std::size_t j = 0; j < tile.weights.size(); ++j) {
    const float index = static_cast<float>(j), importance = tile.importance[j];
    const float* weights = tile.weights[j].at;
    float* losses = tile.losses[j].at;
    for (std::size_t r = 0; r < kLanes; ++r) {
      const float x = weights[r];
      const float with_all = loss(0, r, x, importance);
      const float without_low = loss(1, r, x, importance);
      const float without_high = loss(2, r, x, importance);
      losses[r] = with_all;
      whole.at[r] += with_all;
      above.at[r] += ends.at_low.at[r] == index ? 0.0f : without_low;
      below.at[r] += ends.at_high.at[r] == index ? 0.0f : without_high;
    }
  }
  for (std::size_t r = 0; r < kLanes; ++r) {
    saved_low.at[r] = whole.at[r] - above.at[r];
    saved_high.at[r] = whole.at[r] - below.at[r];
  }
}

// Lets the ranges of `ends` leave out likely outliers:
// quantine.kernels.fit.reference.without_outliers. A cost
// that knows no price meets them as the mean of the others.
QUANTINE_INLINE void leave_out(Tile& tile, const FitRequest& f, Ends& ends) {
  Lanes saved_low, saved_high;
  find_savings(tile, ends, f, saved_low, saved_high);
  Lanes low, high, sum{}, rest{};
  std::fill_n(low.at, kLanes, kInfinity);
  std::fill_n(high.at, kLanes, -kInfinity);
  for (std::size_t j = 0; j < tile.weights.size(); ++j) {
    const float index = static_cast<float>(j);
    const float* weights = tile.weights[j].at;
    float* losses = tile.losses[j].at;
    for (std::size_t r = 0; r < kLanes; ++r) {
      const float x = weights[r], loss = losses[r];
      const float if_low = saved_low.at[r], if_high = saved_high.at[r];
      const float other = ends.at_high.at[r] == index ? if_high : loss;
      const float saved = ends.at_low.at[r] == index ? if_low : other;
      const bool likely = saved > tile.price.at[r];
      const float lowest = likely ? kInfinity : x, highest = likely ? -kInfinity : x;
      const float value = likely ? 0.0f : x, one = likely ? 0.0f : 1.0f;
      losses[r] = saved;
      low.at[r] = smaller(low.at[r], lowest);
      high.at[r] = larger(high.at[r], highest);
      sum.at[r] += value;
      rest.at[r] += one;
    }
  }
  for (std::size_t r = 0; r < kLanes; ++r) {
    const float lowest = low.at[r], highest = high.at[r];
    ends.low.at[r] = rest.at[r] > 0.0f ? lowest : 0.0f;
    ends.high.at[r] = rest.at[r] > 0.0f ? highest : 0.0f;
    sum.at[r] /= larger(rest.at[r], 1.0f);
  }
  if (f.clip != Clip::kPower) return;
  for (std::size_t j = 0; j < tile.weights.size(); ++j)
    for (std::size_t r = 0; r < kLanes; ++r)
      tile.weights[j].at[r] =
          tile.losses[j].at[r] > tile.price.at[r] ? sum.at[r] : tile.weights[j].at[r];
}

// The largest scale that whole ranges need; not a number if a weight is none.
QUANTINE_INLINE float widest(const Ends& ends, const FitRequest& f) {
  Lanes scale{};
  if (f.zero_bits == 0) whole_scales(ends.low, ends.high, f, scale);
  float found = 0.0f, poison = 0.0f;
  for (std::size_t r = 0; r < kLanes; ++r) {
    found = larger(found, scale.at[r]);
    poison += ends.poison.at[r];
  }
  return found + poison;
}

}  // namespace

QUANTINE_CLONES
void replace_outliers(Tile& tile, const FitRequest& f) {
  Ends ends;
  find_ends(tile, ends);
  if (tile.weights.size() > 1) leave_out(tile, f, ends);
}

QUANTINE_CLONES
float fit_range(Tile& tile, const FitRequest& f, float* scale, float* zero, std::size_t lanes) {
  Ends ends;
  find_ends(tile, ends);
  const float needed = widest(ends, f);
  if (f.look_ahead && tile.weights.size() > 1) leave_out(tile, f, ends);
  Grids best;
  cover(ends.low, ends.high, f, best);
  if (f.clip != Clip::kMinMax) {
    Lanes least;
    find_costs(tile, best, f, least);
    for (int k = 1; k < kShrinks; ++k) {
      const float share = static_cast<float>(1.0 - 0.025 * k);
      Lanes low, high, cost;
      for (std::size_t r = 0; r < kLanes; ++r) {
        const float middle = f.zero_bits != 0 ? (ends.low.at[r] + ends.high.at[r]) / 2.0f : 0.0f;
        low.at[r] = middle + (ends.low.at[r] - middle) * share;
        high.at[r] = middle + (ends.high.at[r] - middle) * share;
      }
      Grids tried;
      cover(low, high, f, tried);
      find_costs(tile, tried, f, cost);
      for (std::size_t r = 0; r < kLanes; ++r) {
        const bool better = cost.at[r] < least.at[r];
        least.at[r] = better ? cost.at[r] : least.at[r];
        best.scale.at[r] = better ? tried.scale.at[r] : best.scale.at[r];
        best.zero.at[r] = better ? tried.zero.at[r] : best.zero.at[r];
      }
    }
  }
  std::copy_n(best.scale.at, lanes, scale);
  std::copy_n(best.zero.at, lanes, zero);
  return needed;
}

}  // namespace quantine
