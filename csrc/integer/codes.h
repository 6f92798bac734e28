// Rows of activations rounded to codes on their grids, as integer.cpp multiplies them.
#pragma once

#include <memory>
#include <string>
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

// The level of this name, and the fastest one. Throws std::invalid_argument if there is none.
const IntegerLevel& integer_level(const std::string& name);
const IntegerLevel& best_integer_level();

// The groups of `w`, padded to `step` inputs.
std::vector<Span> spans_of(const Weights& w, std::size_t step);

// Rows of activations, rounded.
class RoundedRows {
 public:
  // Of `columns` inputs, taken in `order` unless that is empty, with one of `spans` for each scale
  // of the grid. `sums`: whether the sums of codes are wanted.
  RoundedRows(std::vector<Span> spans, std::size_t columns, const std::vector<std::uint32_t>& order,
              const InputGrid& grid, const IntegerLevel& level, const float* x, std::size_t rows,
              bool sums, Pool& pool);
  // Of the inputs of `w`.
  RoundedRows(const Weights& w, const InputGrid& grid, const IntegerLevel& level, const float* x,
              std::size_t rows, bool sums, Pool& pool)
      : RoundedRows(spans_of(w, level.step), w.columns, w.order, grid, level, x, rows, sums, pool) {
  }

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
  // What the codes of a row stand for, times its factor, [columns].
  void floats(std::size_t row, float* out) const;

 private:
  void round(const float* x, std::size_t row, std::vector<float>& ordered);
  float factor_of(const float* x) const;

  const std::vector<std::uint32_t>& order_;
  std::size_t columns_;
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
