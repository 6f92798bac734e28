#include "columns.h"

#include <algorithm>
#include <vector>

#include "lanes.h"

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
    round_column(c, j, first, width);
  }
  for (std::size_t i = end; i < stop; ++i) feed_back(c, begin, end, i, first, width);
}

Misfit round_rows(const Columns& c, std::size_t start, std::size_t stop, const Fitter* fitter,
                  RowRange range) {
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
  const std::size_t width = rows_at_once(fitter, c.rows / std::max<std::size_t>(ranges, 1) + 1);
  std::vector<Misfit> misfits((c.rows + width - 1) / width);
  pool.run(misfits.size(), [&](std::size_t index) {
    const std::size_t first = index * width;
    misfits[index] =
        round_rows(c, start, stop, fitter, {first, std::min(width, c.rows - first)});
  });
  return first_misfit(misfits);
}

}  // namespace quantine
