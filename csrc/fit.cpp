#include "fit.h"

#include <limits>
#include <vector>

#include "lanes.h"

namespace quantine {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kShrinks = 21;  // shares of a range that are tried: 1, 0.975, ... 0.5

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
  std::vector<float> importance;  // 1 / spread^2

  explicit Tile(std::size_t n) : weights(n), losses(n), importance(n) {}
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

// Grids over the ranges from `low` to `high`: quantine.core.fit.cover.
QUANTINE_INLINE void cover(const Lanes& low, const Lanes& high, const FitRequest& f, Grids& grid) {
  const float top = static_cast<float>((1 << f.bits) - 1);
  if (f.zero_bits != 0) {
    const float farthest =
        static_cast<float>(std::exp2(std::min(f.scale_bits, f.zero_bits) / 2.0));
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
QUANTINE_INLINE void add_costs(const Tile& tile, const Grids& grid, float top, float price,
                               Lanes& cost) {
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
      cost.at[r] += kIsPower ? power(error) : smaller(error * error * importance, price);
    }
  }
}

QUANTINE_INLINE void find_costs(const Tile& tile, const Grids& grid, const FitRequest& f,
                                Lanes& cost) {
  const float top = static_cast<float>((1 << f.bits) - 1);
  if (f.clip == Clip::kPower)
    add_costs<true>(tile, grid, top, f.price, cost);
  else
    add_costs<false>(tile, grid, top, f.price, cost);
}

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

// Lets the ranges of `ends` leave out likely outliers: quantine.core.fit.without_outliers. A cost
// that knows no price meets them as the mean of the others.
QUANTINE_INLINE void leave_out(Tile& tile, const FitRequest& f, Ends& ends) {
  const float price = f.price;
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
      const bool likely = saved > price;
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
          tile.losses[j].at[r] > f.price ? sum.at[r] : tile.weights[j].at[r];
}

QUANTINE_INLINE void replace_outliers(Tile& tile, const FitRequest& f) {
  Ends ends;
  find_ends(tile, ends);
  if (tile.weights.size() > 1) leave_out(tile, f, ends);
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

// The grid over the whole range, or over the share of it that costs least. Returns `widest`.
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

// Scales or zero points of a group while codes are chosen: value = (code - zero) * step.
struct Level {
  explicit Level(std::size_t rows) : code(rows), step(rows, 1.0f), zero(rows, 0.0f) {}
  std::vector<float> code, step, zero;
  float top = 0.0f;  // largest code; 0 where there is no choice
};

// Float16 above what `step` is, where float16 is coarse.
float half_above(float step) {
  if (step >= 6.103515625e-05f) return to_half(step);
  return std::ceil(step / kSmallestHalf) * kSmallestHalf;
}

// Puts level.code, which holds values, on second grids: quantine.core.grid.fit_statistic.
Misfit fit_statistic(Level& level, int bits, std::size_t run, const Statistic& stored) {
  level.top = static_cast<float>((1 << bits) - 1);
  for (std::size_t first = 0; first < level.code.size(); first += run) {
    float* code = level.code.data() + first;
    const std::size_t count = std::min(run, level.code.size() - first);
    float low = code[0], high = code[0];
    for (std::size_t r = 1; r < count; ++r) {
      low = smaller(low, code[r]);
      high = larger(high, code[r]);
    }
    const float reach = larger(std::fabs(low), std::fabs(high));
    // Float16 must hold the step, and then the zero point.
    const float least = larger(reach * 0x1p-15f, kSmallestHalf);
    const float wanted = larger((high - low) / level.top, least);
    if (!(to_half(wanted) <= kLargestHalf)) return {Misfit::kStatistic, wanted};
    if (!(std::fabs(to_half(low)) <= kLargestHalf)) return {Misfit::kStatistic, std::fabs(low)};
    // Too narrow for float16 to tell its ends apart: one value, as the step from a zero at -1.
    const bool single = high - low <= 0x1p-10f * reach && reach >= kSmallestHalf;
    const float step = single ? to_half(low) : half_above(wanted);
    const float zero = single ? -1.0f : to_half(-low / step);
    for (std::size_t r = 0; r < count; ++r)
      code[r] = nearest_code(code[r] / step + zero, level.top);
    std::fill_n(level.step.begin() + static_cast<std::ptrdiff_t>(first), count, step);
    std::fill_n(level.zero.begin() + static_cast<std::ptrdiff_t>(first), count, zero);
    stored.step[first / run] = step;
    stored.zero[first / run] = zero;
  }
  return {Misfit::kNone, 0.0f};
}

// How scales, in level.code, are stored.
Misfit store_scales(Level& level, const FitRequest& f, const Statistic& stored) {
  if (f.scale_bits != 16) return fit_statistic(level, f.scale_bits, f.run, stored);
  for (float& scale : level.code) {
    if (!(scale <= kLargestHalf)) return {Misfit::kScale, scale};
    scale = to_half(larger(scale, kSmallestHalf));
  }
  return {Misfit::kNone, 0.0f};
}

Misfit store_zeros(Level& level, const FitRequest& f, const Statistic& stored) {
  if (f.zero_bits != 0 && f.zero_bits != 16)
    return fit_statistic(level, f.zero_bits, f.run, stored);
  if (f.zero_bits == 0) {
    level.top = f.symmetric ? 0.0f : static_cast<float>((1 << f.bits) - 1);
    return {Misfit::kNone, 0.0f};
  }
  for (float& zero : level.code) {
    const float half = to_half(zero);
    if (!(std::fabs(half) <= kLargestHalf)) return {Misfit::kStatistic, std::fabs(zero)};
    zero = half;
  }
  return {Misfit::kNone, 0.0f};
}

// Each row of a tile takes the neighbouring codes of scale and zero point that cost least.
QUANTINE_CLONES
void refine(Tile& tile, const FitRequest& f, Level& scale, Level& zero, std::size_t first,
            std::size_t lanes) {
  static constexpr float kShifts[] = {0.0f, -1.0f, 1.0f};
  Lanes least, scale_code{}, zero_code{}, scale_step{}, scale_zero{}, zero_step{}, zero_zero{};
  std::copy_n(scale.code.data() + first, lanes, scale_code.at);
  std::copy_n(scale.step.data() + first, lanes, scale_step.at);
  std::copy_n(scale.zero.data() + first, lanes, scale_zero.at);
  std::copy_n(zero.code.data() + first, lanes, zero_code.at);
  std::copy_n(zero.step.data() + first, lanes, zero_step.at);
  std::copy_n(zero.zero.data() + first, lanes, zero_zero.at);
  Lanes best_scale = scale_code, best_zero = zero_code;
  if (f.clip == Clip::kPower && f.look_ahead) replace_outliers(tile, f);
  std::fill_n(least.at, kLanes, kInfinity);
  for (int i = 0; i < (scale.top > 0.0f ? 3 : 1); ++i)
    for (int k = 0; k < (zero.top > 0.0f ? 3 : 1); ++k) {
      Lanes scale_tried, zero_tried, cost;
      Grids tried;
      for (std::size_t r = 0; r < kLanes; ++r) {
        const float s = scale_code.at[r] + kShifts[i], z = zero_code.at[r] + kShifts[k];
        scale_tried.at[r] = i == 0 ? s : smaller(larger(s, 0.0f), scale.top);
        zero_tried.at[r] = k == 0 ? z : smaller(larger(z, 0.0f), zero.top);
        const float value = (scale_tried.at[r] - scale_zero.at[r]) * scale_step.at[r];
        tried.scale.at[r] = larger(value, kSmallestDivisor);
        tried.zero.at[r] = (zero_tried.at[r] - zero_zero.at[r]) * zero_step.at[r];
      }
      find_costs(tile, tried, f, cost);
      for (std::size_t r = 0; r < kLanes; ++r) {
        const bool better = cost.at[r] < least.at[r];
        least.at[r] = better ? cost.at[r] : least.at[r];
        best_scale.at[r] = better ? scale_tried.at[r] : best_scale.at[r];
        best_zero.at[r] = better ? zero_tried.at[r] : best_zero.at[r];
      }
    }
  std::copy_n(best_scale.at, lanes, scale.code.data() + first);
  std::copy_n(best_zero.at, lanes, zero.code.data() + first);
}

void put_out(const Level& level, bool on_second_grid, const Statistic& stored) {
  for (std::size_t r = 0; r < level.code.size(); ++r)
    stored.values[r] = (level.code[r] - level.zero[r]) * level.step[r];
  if (!on_second_grid) return;
  for (std::size_t r = 0; r < level.code.size(); ++r)
    stored.codes[r] = static_cast<std::uint8_t>(level.code[r]);
}

Statistic of_group(const Statistic& all, std::size_t group, std::size_t rows, std::size_t runs) {
  return {all.values + group * rows, all.codes + group * rows, all.step + group * runs,
          all.zero + group * runs};
}

}  // namespace

Misfit fit_group(const Fitter& fitter, const float* columns, std::size_t rows,
                 std::size_t start) {
  const FitRequest& f = fitter.request;
  const std::size_t n = fitter.length, group = start / n;
  const Statistic stored_scale = of_group(fitter.scale, group, rows, fitter.runs);
  const Statistic stored_zero = of_group(fitter.zero, group, rows, fitter.runs);
  Tile tile(n);
  for (std::size_t j = 0; j < n; ++j) {
    const float spread = fitter.spread[start + j];
    tile.importance[j] = 1.0f / (spread * spread);
  }
  Level scale(rows), zero(rows);
  for (std::size_t first = 0; first < rows; first += kLanes) {
    const std::size_t lanes = std::min(kLanes, rows - first);
    tile.load(columns + first, rows, lanes);
    const float needed =
        fit_range(tile, f, scale.code.data() + first, zero.code.data() + first, lanes);
    if (!(needed <= kLargestHalf)) return {Misfit::kScale, needed};
  }
  Misfit misfit = store_scales(scale, f, stored_scale);
  if (misfit.kind == Misfit::kNone) misfit = store_zeros(zero, f, stored_zero);
  if (misfit.kind != Misfit::kNone) return misfit;
  const bool coded_scale = f.scale_bits != 16, coded_zero = f.zero_bits != 0 && f.zero_bits != 16;
  if ((coded_scale || coded_zero) && f.clip != Clip::kMinMax)
    for (std::size_t first = 0; first < rows; first += kLanes) {
      const std::size_t lanes = std::min(kLanes, rows - first);
      tile.load(columns + first, rows, lanes);
      refine(tile, f, scale, zero, first, lanes);
    }
  put_out(scale, coded_scale, stored_scale);
  put_out(zero, coded_zero, stored_zero);
  return {Misfit::kNone, 0.0f};
}

}  // namespace quantine
