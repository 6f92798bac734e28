// From the range of a group, which range.cpp finds, to its grid as it is stored: in float16, or as
// codes of second grids, whose neighbours are tried as well.
#include "fit/fit.h"

#include <limits>
#include <vector>

#include "fit/tile.h"

namespace quantine {
namespace {

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

// Puts level.code, which holds values, on the second grid of one run, from `first`.
void put_on_grid(Level& level, std::size_t first, std::size_t count, float step, float zero) {
  float* code = level.code.data() + first;
  for (std::size_t r = 0; r < count; ++r) code[r] = nearest_code(code[r] / step + zero, level.top);
  std::fill_n(level.step.begin() + static_cast<std::ptrdiff_t>(first), count, step);
  std::fill_n(level.zero.begin() + static_cast<std::ptrdiff_t>(first), count, zero);
}

// Puts level.code, which holds values, on second grids: quantine.core.fit_range.fit_statistic.
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
    put_on_grid(level, first, count, step, zero);
    stored.step[first / run] = step;
    stored.zero[first / run] = zero;
  }
  return {Misfit::kNone, 0.0f};
}

// Likewise, where the second grids are known.
Misfit put_on_given(Level& level, int bits, std::size_t run, const Statistic& stored) {
  level.top = static_cast<float>((1 << bits) - 1);
  for (std::size_t first = 0; first < level.code.size(); first += run)
    put_on_grid(level, first, std::min(run, level.code.size() - first), stored.step[first / run],
                stored.zero[first / run]);
  return {Misfit::kNone, 0.0f};
}

Misfit put_on_second(Level& level, const FitRequest& f, int bits, const Statistic& stored) {
  return f.given ? put_on_given(level, bits, f.run, stored)
                 : fit_statistic(level, bits, f.run, stored);
}

// How scales, in level.code, are stored.
Misfit store_scales(Level& level, const FitRequest& f, const Statistic& stored) {
  if (f.scale_bits != 16) return put_on_second(level, f, f.scale_bits, stored);
  for (float& scale : level.code) {
    if (!(scale <= kLargestHalf)) return {Misfit::kScale, scale};
    scale = to_half(larger(scale, kSmallestHalf));
  }
  return {Misfit::kNone, 0.0f};
}

Misfit store_zeros(Level& level, const FitRequest& f, const Statistic& stored) {
  if (f.zero_bits != 0 && f.zero_bits != 16)
    return put_on_second(level, f, f.zero_bits, stored);
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
  std::fill_n(least.at, kLanes, std::numeric_limits<float>::infinity());
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

bool on_second_grid(int bits) { return bits != 0 && bits != 16; }

}  // namespace

Statistic of_group(const Fitter& fitter, const Statistic& all, std::size_t group,
                   std::size_t rows, std::size_t first) {
  const std::size_t value = group * rows + first;
  const std::size_t second = group * fitter.runs + first / fitter.request.run;
  return {all.values + value, all.codes + value, all.step + second, all.zero + second};
}

std::size_t rows_at_once(const Fitter* fitter, std::size_t wanted) {
  std::size_t unit = kLanes;
  if (fitter != nullptr) {
    const FitRequest& f = fitter->request;
    if (fitter->of_columns) unit = fitter->length;
    else if (on_second_grid(f.scale_bits) || on_second_grid(f.zero_bits)) unit = f.run;
  }
  return (wanted + unit - 1) / unit * unit;
}

Misfit fit_group(const Fitter& fitter, const float* columns, std::size_t rows, std::size_t start,
                 RowRange range) {
  const FitRequest& f = fitter.request;
  const std::size_t n = fitter.length, group = start / n;
  const Statistic stored_scale = of_group(fitter, fitter.scale, group, rows, range.first);
  const Statistic stored_zero = of_group(fitter, fitter.zero, group, rows, range.first);
  Tile tile(fitter, start);
  const auto load = [&](std::size_t first, std::size_t lanes) {
    tile.load(columns + range.first + first, rows, lanes);
    if (fitter.of_columns) tile.set_prices(fitter.spread + range.first + first, f.price, lanes);
  };
  Level scale(range.count), zero(range.count);
  for (std::size_t first = 0; first < range.count; first += kLanes) {
    const std::size_t lanes = std::min(kLanes, range.count - first);
    load(first, lanes);
    const float needed =
        fit_range(tile, f, scale.code.data() + first, zero.code.data() + first, lanes);
    if (!(needed <= kLargestHalf)) return {Misfit::kScale, needed};
  }
  Misfit misfit = store_scales(scale, f, stored_scale);
  if (misfit.kind == Misfit::kNone) misfit = store_zeros(zero, f, stored_zero);
  if (misfit.kind != Misfit::kNone) return misfit;
  const bool coded_scale = on_second_grid(f.scale_bits), coded_zero = on_second_grid(f.zero_bits);
  if ((coded_scale || coded_zero) && f.clip != Clip::kMinMax)
    for (std::size_t first = 0; first < range.count; first += kLanes) {
      const std::size_t lanes = std::min(kLanes, range.count - first);
      load(first, lanes);
      refine(tile, f, scale, zero, first, lanes);
    }
  put_out(scale, coded_scale, stored_scale);
  put_out(zero, coded_zero, stored_zero);
  return {Misfit::kNone, 0.0f};
}

Misfit fit_groups(const Fitter& fitter, const float* columns, std::size_t inputs,
                  std::size_t rows, Pool& pool) {
  std::vector<Misfit> misfits(inputs / fitter.length);
  pool.run(misfits.size(), [&](std::size_t group) {
    const std::size_t start = group * fitter.length;
    misfits[group] = fit_group(fitter, columns + start * rows, rows, start, {0, rows});
  });
  return first_misfit(misfits);
}

Misfit first_misfit(const std::vector<Misfit>& misfits) {
  for (const Misfit& misfit : misfits)
    if (misfit.kind != Misfit::kNone) return misfit;
  return {Misfit::kNone, 0.0f};
}

}  // namespace quantine
