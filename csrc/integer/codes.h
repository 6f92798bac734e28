// Rows of activations rounded to codes on their grids, as integer.cpp multiplies them.
#pragma once

#include <memory>
#include <vector>

#include "integer/integer.h"
#include "integer/level.h"

namespace quantine {

struct alignas(64) Line {
  std::uint8_t at[64];
};

// Memory that is not set to anything, in whole lines.
template <typename T>
class Lines64 {
 public:
  explicit Lines64(std::size_t count) : lines_(new Line[count * sizeof(T) / sizeof(Line) + 1]) {}
  T* data() { return reinterpret_cast<T*>(lines_.get()); }
  const T* data() const { return reinterpret_cast<const T*>(lines_.get()); }

 private:
  std::unique_ptr<Line[]> lines_;
};

// The groups of `w`, padded to `step` inputs.
std::vector<Span> spans_of(const Weights& w, std::size_t step);

// Rows of activations, rounded.
class RoundedRows {
 public:
  // `sums`: whether the sums of codes are wanted.
  RoundedRows(const Weights& w, const InputGrid& grid, const IntegerLevel& level, const float* x,
              std::size_t rows, bool sums, Pool& pool);

  const Codes& codes() const { return codes_; }
  bool own_grids() const { return !own_scale_.empty(); }
  // Of rows with grids of their own.
  float scale(std::size_t row) const { return own_scale_[row]; }
  float zero(std::size_t row) const { return own_zero_[row]; }
  // What results of a row are multiplied by, where rows have factors.
  bool has_factors() const { return !factor_.empty(); }
  float factor(std::size_t row) const { return factor_[row]; }
  // Rows that become NaN.
  bool is_lost(std::size_t row) const { return lost_[row] != 0; }
  // What the codes of `count` rows from `row` stand for, without factors, [columns, count].
  void values(std::size_t row, std::size_t count, float* out) const;

 private:
  void round(const Weights& w, const float* x, std::size_t row, std::vector<float>& ordered);
  float factor_of(const float* x) const;

  const InputGrid& grid_;
  const IntegerLevel& level_;
  std::vector<Span> spans_;
  std::vector<float> own_scale_, own_zero_, factor_;
  std::vector<std::uint8_t> lost_;
  Codes codes_;
  Lines64<std::uint8_t> memory_;
  std::vector<float> sums_;
};

}  // namespace quantine
