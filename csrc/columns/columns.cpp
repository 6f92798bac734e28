// Rounds columns one after another, in ranges of rows that threads share, and feeds errors back.
#include "columns/columns.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "base/lanes.h"

namespace quantine {
namespace {

constexpr std::size_t kPart = 16;    // columns whose errors reach the others at once
constexpr std::size_t kRows = 256;   // at once: a block of their columns stays in cache

// Rounds one column of `width` rows from row `first`.
QUANTINE_INLINE void round_column(const Columns& c, std::size_t j, std::size_t first,
                                  std::size_t width) {
  const float top = static_cast<float>((1 << c.bits) - 1);
  const float diagonal = c.upper[j * c.inputs + j];
  const std::size_t grid = static_cast<std::size_t>(c.groups[j]) * c.rows + first;
  const float* __restrict scale = c.scales + grid;
  const float* __restrict zero = c.zeros + grid;
  const float* __restrict weight = c.weights + j * c.rows + first;
  float* __restrict error = c.errors + j * c.rows + first;
  std::uint8_t* __restrict code_out = c.codes + j * c.rows + first;
  for (std::size_t r = 0; r < width; ++r) {
    const float divisor = larger(scale[r], kSmallestDivisor);
    const float code = nearest_code(weight[r] / divisor + zero[r], top);
    code_out[r] = static_cast<std::uint8_t>(static_cast<std::int32_t>(code));
    error[r] = (weight[r] - (code - zero[r]) * divisor) / diagonal;
  }
  if (c.kept == nullptr) return;
  std::uint8_t* __restrict kept = c.kept + j * c.rows + first;
  for (std::size_t r = 0; r < width; ++r) {
    const float exact = to_half(weight[r]);
    const float lost = (weight[r] - exact) / diagonal;
    const bool keep = error[r] * error[r] > c.price && std::fabs(lost) < std::fabs(error[r]) &&
                      std::fabs(exact) <= kLargestHalf;
    error[r] = keep ? lost : error[r];
    kept[r] = keep ? 1 : 0;
  }
}

// `round_column` where rows are coupled: runs of them go from the last row to the first, and each
// row is asked to make up for those after it. `width` is in whole runs, or ends with the last row.
QUANTINE_INLINE void round_coupled(const Columns& c, std::size_t j, std::size_t first,
                                   std::size_t width) {
  const float top = static_cast<float>((1 << c.bits) - 1);
  const float diagonal = c.upper[j * c.inputs + j];
  const std::size_t grid = static_cast<std::size_t>(c.groups[j]) * c.rows;
  std::vector<float> asked(c.run);
  for (std::size_t begin = first; begin < first + width; begin += c.run) {
    const std::size_t count = std::min(c.run, first + width - begin);
    std::fill(asked.begin(), asked.end(), 0.0f);
    for (std::size_t i = count; i-- > 0;) {
      const std::size_t row = begin + i, place = j * c.rows + row;
      const float divisor = larger(c.scales[grid + row], kSmallestDivisor);
      const float zero = c.zeros[grid + row], before = c.weights[place];
      const float wanted = before + asked[i];
      const float code = nearest_code(wanted / divisor + zero, top);
      float value = (code - zero) * divisor;
      c.codes[place] = static_cast<std::uint8_t>(static_cast<std::int32_t>(code));
      if (c.kept != nullptr) {
        const float exact = to_half(wanted), error = (wanted - value) / diagonal;
        const float lost = (wanted - exact) / diagonal;
        const bool keep = error * error > c.price && std::fabs(lost) < std::fabs(error) &&
                          std::fabs(exact) <= kLargestHalf;
        value = keep ? exact : value;
        c.kept[place] = keep ? 1 : 0;
      }
      const float left = before - value;
      c.weights[place] = wanted;
      c.errors[place] = left / diagonal;
      const float* __restrict coupling = c.coupling + row * c.run;
      float* __restrict sums = asked.data();
      for (std::size_t k = 0; k < i; ++k) sums[k] += coupling[k] * left;
    }
  }
}

// Takes the errors of columns from `begin` to `end` off `lanes` rows of column `i`.
QUANTINE_INLINE void feed_lanes(const Columns& c, std::size_t begin, std::size_t end,
                                std::size_t i, std::size_t first, std::size_t lanes) {
  float* behind = c.weights + i * c.rows + first;
  float left[kLanes];
  for (std::size_t r = 0; r < lanes; ++r) left[r] = behind[r];
  for (std::size_t j = begin; j < end; ++j) {
    const float factor = c.upper[j * c.inputs + i];
    const float* error = c.errors + j * c.rows + first;
    for (std::size_t r = 0; r < lanes; ++r) left[r] -= factor * error[r];
  }
  for (std::size_t r = 0; r < lanes; ++r) behind[r] = left[r];
}

QUANTINE_INLINE void feed_back(const Columns& c, std::size_t begin, std::size_t end,
                               std::size_t i, std::size_t first, std::size_t width) {
  std::size_t r = 0;
  for (; r + kLanes <= width; r += kLanes)  // a fixed count stays in registers
    feed_lanes(c, begin, end, i, first + r, kLanes);
  if (r < width) feed_lanes(c, begin, end, i, first + r, width - r);
}

QUANTINE_CLONES
void round_part(const Columns& c, std::size_t begin, std::size_t end, std::size_t stop,
                std::size_t first, std::size_t width) {
  for (std::size_t j = begin; j < end; ++j) {
    feed_back(c, begin, j, j, first, width);
    if (c.coupling == nullptr) round_column(c, j, first, width);
    else round_coupled(c, j, first, width);
  }
  for (std::size_t i = end; i < stop; ++i) feed_back(c, begin, end, i, first, width);
}

// Fits the groups of outputs of column `j` in a range of rows, and spreads their grids over the
// rows of `scales` and `zeros`.
Misfit fit_column(const Fitter& fitter, const Columns& c, std::size_t j, RowRange range,
                  float* scales, float* zeros) {
  const std::size_t n = fitter.length, groups = range.count / n;
  const std::size_t all = c.rows / n, first = range.first / n;
  const float* column = c.weights + j * c.rows + range.first;
  std::vector<float> lines(range.count);
  for (std::size_t k = 0; k < groups; ++k)
    for (std::size_t i = 0; i < n; ++i) lines[i * groups + k] = column[k * n + i];
  const std::vector<float> spread(groups, fitter.spread[j]);
  const Fitter one{fitter.request,
                   true,
                   spread.data(),
                   n,
                   fitter.runs,
                   of_group(fitter, fitter.scale, j, all, first),
                   of_group(fitter, fitter.zero, j, all, first)};
  const Misfit misfit = fit_group(one, lines.data(), groups, 0, {0, groups});
  for (std::size_t k = 0; k < groups; ++k) {
    std::fill_n(scales + range.first + k * n, n, one.scale.values[k]);
    std::fill_n(zeros + range.first + k * n, n, one.zero.values[k]);
  }
  return misfit;
}

// `round_rows` where groups run along outputs. Every column is a part of its own, since its grids
// are fitted to what all columns before it have left.
Misfit round_groups(const Columns& c, std::size_t start, std::size_t stop, const Fitter& fitter,
                    RowRange range) {
  std::vector<float> scales(c.rows), zeros(c.rows);
  const std::vector<std::int64_t> groups(c.inputs, 0);
  Columns column = c;
  column.scales = scales.data();
  column.zeros = zeros.data();
  column.groups = groups.data();
  for (std::size_t j = start; j < stop; ++j) {
    const Misfit misfit = fit_column(fitter, c, j, range, scales.data(), zeros.data());
    if (misfit.kind != Misfit::kNone) return misfit;
    round_part(column, j, j + 1, stop, range.first, range.count);
  }
  return {Misfit::kNone, 0.0f};
}

// At least `wanted` rows in whole runs, of those that are fitted together and of coupled ones.
std::size_t rows_together(const Columns& c, const Fitter* fitter, std::size_t wanted) {
  const std::size_t unit = rows_at_once(fitter, 1);
  const std::size_t whole = c.coupling == nullptr ? unit : std::lcm(unit, c.run);
  return (wanted + whole - 1) / whole * whole;
}

Misfit round_rows(const Columns& c, std::size_t start, std::size_t stop, const Fitter* fitter,
                  RowRange range) {
  if (fitter != nullptr && fitter->of_columns) return round_groups(c, start, stop, *fitter, range);
  std::size_t end = start;
  for (std::size_t begin = start; begin < stop; begin = end) {
    end = std::min(begin + kPart, stop);
    if (fitter != nullptr) {
      end = std::min(end, (begin / fitter->length + 1) * fitter->length);
      if (begin % fitter->length == 0) {
        const Misfit misfit =
            fit_group(*fitter, c.weights + begin * c.rows, c.rows, begin, range);
        if (misfit.kind != Misfit::kNone) return misfit;
      }
    }
    round_part(c, begin, end, stop, range.first, range.count);
  }
  return {Misfit::kNone, 0.0f};
}

}  // namespace

Misfit round_block(const Columns& c, std::size_t start, std::size_t stop, const Fitter* fitter,
                   Pool& pool) {
  // As many ranges of rows as keep every thread busy to the end.
  const std::size_t turns = (c.rows + kRows * pool.threads() - 1) / (kRows * pool.threads());
  const std::size_t ranges = turns * pool.threads();
  const std::size_t width =
      rows_together(c, fitter, c.rows / std::max<std::size_t>(ranges, 1) + 1);
  std::vector<Misfit> misfits((c.rows + width - 1) / width);
  pool.run(misfits.size(), [&](std::size_t index) {
    const std::size_t first = index * width;
    misfits[index] =
        round_rows(c, start, stop, fitter, {first, std::min(width, c.rows - first)});
  });
  return first_misfit(misfits);
}

}  // namespace quantine
