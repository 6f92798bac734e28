// Finds the grid and the factor of each row of activations, where it has its own, and rounds it.
#include "integer/codes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "base/lanes.h"

namespace quantine {
namespace {

constexpr std::size_t kTogether = 16;     // rows that a thread rounds at once
constexpr std::size_t kWhole = 32;        // rows that kernels may read at once
// SMALLEST_ACTIVATION_SHARE and SMALLEST_ACTIVATION_SCALE of quantine.core.fit_range.
constexpr float kSmallestShare = 0x1p-22f, kSmallestStep = 1e-30f;
// Of quantine.kernels.integer.token_factors.
constexpr float kSmallestFactor = 1e-30f, kLargestFactor = 4.0f;
constexpr float kFinite = std::numeric_limits<float>::max();

struct Ends {
  float low, high;
};

// The least and the largest of a row.
QUANTINE_CLONES
Ends ends_of(const float* x, std::size_t count) {
  constexpr std::size_t kWide = 16;
  float low[kWide], high[kWide];
  for (std::size_t lane = 0; lane < kWide; ++lane) low[lane] = high[lane] = x[0];
  std::size_t at = 0;
  for (; at + kWide <= count; at += kWide)
    for (std::size_t lane = 0; lane < kWide; ++lane) {
      low[lane] = smaller(low[lane], x[at + lane]);
      high[lane] = larger(high[lane], x[at + lane]);
    }
  for (; at < count; ++at) {
    low[0] = smaller(low[0], x[at]);
    high[0] = larger(high[0], x[at]);
  }
  return {*std::min_element(low, low + kWide), *std::max_element(high, high + kWide)};
}

QUANTINE_INLINE float larger_product(float x, float above, float below) {
  const float finite = smaller(larger(x, -kFinite), kFinite);
  return larger(finite * above, finite * below);
}

// The largest of `best` and the products of values with `above` and `below`.
QUANTINE_CLONES
float steepest(const float* x, std::size_t count, float above, float below, float best) {
  constexpr std::size_t kWide = 16;
  float found[kWide];
  for (float& lane : found) lane = best;
  std::size_t at = 0;
  for (; at + kWide <= count; at += kWide)
    for (std::size_t lane = 0; lane < kWide; ++lane)
      found[lane] = larger(found[lane], larger_product(x[at + lane], above, below));
  for (; at < count; ++at) found[0] = larger(found[0], larger_product(x[at], above, below));
  return *std::max_element(found, found + kWide);
}

QUANTINE_CLONES
void divide(const float* x, std::size_t count, float by, float* out) {
  for (std::size_t j = 0; j < count; ++j) out[j] = x[j] / by;
}

// What codes of one grid stand for.
QUANTINE_CLONES
void decode(const std::uint8_t* codes, std::size_t count, float scale, float zero, float* out) {
  for (std::size_t j = 0; j < count; ++j) out[j] = (static_cast<float>(codes[j]) - zero) * scale;
}

QUANTINE_CLONES
void multiply(float* x, std::size_t count, float by) {
  for (std::size_t j = 0; j < count; ++j) x[j] *= by;
}

// An odd number of cache lines: rows at a power of two would displace each other.
std::size_t stride_of(const std::vector<Span>& spans) {
  const std::size_t used = spans.back().start + spans.back().padded;
  return ((used + sizeof(Line) - 1) / sizeof(Line) | 1) * sizeof(Line);
}

}  // namespace

std::vector<Span> spans_of(const Weights& w, std::size_t step) {
  std::vector<Span> spans(w.groups, Span{0, 0, 0, 0});
  for (const Block& block : w.blocks) {
    Span& span = spans[block.group];
    if (span.width == 0) span.column = block.first;
    span.width += block.width;
  }
  std::size_t start = 0;
  for (Span& span : spans) {
    span.start = start;
    span.padded = (span.width + step - 1) / step * step;
    start += span.padded;
  }
  return spans;
}

RoundedRows::RoundedRows(std::vector<Span> spans, std::size_t columns,
                         const std::vector<std::uint32_t>& order, const InputGrid& grid,
                         const IntegerLevel& level, const float* x, std::size_t rows, bool sums,
                         Pool& pool)
    : order_(order),
      columns_(columns),
      grid_(grid),
      level_(level),
      spans_(std::move(spans)),
      lost_(rows),
      codes_{spans_.data(), spans_.size(), stride_of(spans_), nullptr, nullptr},
      memory_((rows + kWhole) / kWhole * kWhole * codes_.stride) {
  codes_.codes = memory_.data();
  if (sums) {
    sums_.resize((rows + kWhole) / kWhole * kWhole * spans_.size());
    codes_.sums = sums_.data();
  }
  if (grid.scale.empty()) {
    own_scale_.resize(rows);
    own_zero_.resize(rows);
  }
  if (!grid.above.empty()) factor_.resize(rows);
  pool.run((rows + kTogether - 1) / kTogether, [&](std::size_t index) {
    std::vector<float> ordered;
    for (std::size_t row = index * kTogether; row < std::min(rows, (index + 1) * kTogether); ++row)
      round(x + row * columns, row, ordered);
  });
}

void RoundedRows::round(const float* x, std::size_t row, std::vector<float>& ordered) {
  if (!order_.empty()) {
    ordered.resize(columns_);
    for (std::size_t j = 0; j < columns_; ++j) ordered[j] = x[order_[j]];
    x = ordered.data();
  }
  if (has_factors()) {
    factor_[row] = factor_of(x);
    ordered.resize(columns_);
    divide(x, columns_, factor_[row], ordered.data());
    x = ordered.data();
  }
  const float top = static_cast<float>((1 << grid_.bits) - 1);
  const float *scales = grid_.scale.data(), *zeros = grid_.zero.data();
  if (own_grids()) {
    const Ends ends = ends_of(x, columns_);
    const float reach = larger(std::fabs(ends.low), std::fabs(ends.high));
    const float least = larger(reach * kSmallestShare, kSmallestStep);
    own_scale_[row] = larger((ends.high - ends.low) / top, least);
    own_zero_[row] = std::nearbyint(-ends.low / own_scale_[row]);
    scales = &own_scale_[row];
    zeros = &own_zero_[row];
    lost_[row] = !std::isfinite(own_scale_[row]);
  }
  std::vector<std::int32_t> sums(codes_.sums == nullptr ? 0 : spans_.size());
  if (level_.round(x, codes_, scales, zeros, own_grids(), top, memory_.data() + row * codes_.stride,
                   sums.empty() ? nullptr : sums.data()))
    lost_[row] = 1;
  std::copy(sums.begin(), sums.end(),
            sums_.begin() + static_cast<std::ptrdiff_t>(row * spans_.size()));
}

// Of a row in stored order.
float RoundedRows::factor_of(const float* x) const {
  float best = kSmallestFactor;
  for (std::size_t group = 0; group < spans_.size(); ++group)
    best = steepest(x + spans_[group].column, spans_[group].width, grid_.above[group],
                    grid_.below[group], best);
  return smaller(best, kLargestFactor);
}

void RoundedRows::values(std::size_t row, std::size_t count, float* out) const {
  for (std::size_t group = 0; group < spans_.size(); ++group) {
    const Span& span = spans_[group];
    for (std::size_t r = 0; r < count; ++r) {
      const std::uint8_t* codes = codes_.codes + (row + r) * codes_.stride + span.start;
      const float scale = own_grids() ? own_scale_[row + r] : grid_.scale[group];
      const float zero = own_grids() ? own_zero_[row + r] : grid_.zero[group];
      for (std::size_t i = 0; i < span.width; ++i)
        out[(span.column + i) * count + r] =
            (static_cast<float>(codes[i]) - zero) * scale;
    }
  }
}

void RoundedRows::floats(std::size_t row, float* out) const {
  if (is_lost(row)) {
    std::fill_n(out, columns_, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  for (std::size_t group = 0; group < spans_.size(); ++group) {
    const Span& span = spans_[group];
    const float scale = own_grids() ? own_scale_[row] : grid_.scale[group];
    const float zero = own_grids() ? own_zero_[row] : grid_.zero[group];
    decode(codes_.codes + row * codes_.stride + span.start, span.width, scale, zero,
           out + span.column);
  }
  if (has_factors()) multiply(out, columns_, factor_[row]);
}

void round_inputs(const InputGrid& grid, const std::vector<std::size_t>& ends, const float* x,
                  std::size_t batch, float* y, Pool& pool) {
  static const std::vector<std::uint32_t> as_they_are;
  const std::size_t columns = ends.back();
  std::vector<Span> spans;
  std::size_t first = 0;
  for (const std::size_t end : ends) {
    spans.push_back({first, end - first, first, end - first});
    first = end;
  }
  const RoundedRows rows(std::move(spans), columns, as_they_are, grid, best_integer_level(), x,
                         batch, false, pool);
  for (std::size_t row = 0; row < batch; ++row) rows.floats(row, y + row * columns);
}

}  // namespace quantine
