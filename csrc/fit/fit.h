// The grid of a group of weights. Matrices are transposed, [inputs, rows]: rows, the outputs, are
// contiguous. The meaning is quantine.kernels.fit.reference in PyTorch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/pool.h"

namespace quantine {

enum class Clip { kMinMax, kPower, kHessian };

// What is asked of a grid: see quantine.core.spec.QuantSpec and
// quantine.kernels.fit.grid_cost.GridCost.
struct FitRequest {
  int bits;
  bool symmetric;
  int scale_bits;   // 16, or bits of a code on a second grid
  int zero_bits;    // 0: whole zero points of `bits` bits; 16; or bits of a code on a second grid
  std::size_t run;  // rows that share a second grid
  Clip clip;
  float price;      // infinite: no weight can be kept apart
  bool look_ahead;  // the range leaves out likely outliers
  bool given;       // second grids are known, only codes are found
};

// Scales, or zero points, of one group. On a second grid value = (code - zero) * step.
struct Statistic {
  float* values;        // [rows]
  std::uint8_t* codes;  // [rows], of a second grid only
  float* step;          // [runs], likewise
  float* zero;          // [runs], likewise
};

// Why no grid is found: `value` does not fit into float16.
struct Misfit {
  enum Kind { kNone, kScale, kStatistic } kind;
  float value;
};

// The first that is one.
Misfit first_misfit(const std::vector<Misfit>& misfits);

// Fits a matrix group by group.
struct Fitter {
  FitRequest request;
  bool of_columns;        // groups run along outputs: what is a row here is a line of one input
  const float* spread;    // [inputs], or [rows] of columns: what errors are divided by; positive
  std::size_t length;     // inputs of a group
  std::size_t runs;       // second grids of a group
  Statistic scale, zero;  // of the first group; others follow at distances of rows, or of runs
};

// Rows from `first`, `count` of them. Second grids lie within: `first` is a multiple of the run.
struct RowRange {
  std::size_t first, count;
};

// At least `wanted` rows, positive, which can be cut off and fitted alone: in whole runs of
// `fitter`, if it is not null. What is found does not depend on where rows are cut.
std::size_t rows_at_once(const Fitter* fitter, std::size_t wanted);

// Fits the grid of each row of a range over the weights of a group.
//
//   columns  [length, rows]
//   start    their first input
Misfit fit_group(const Fitter& fitter, const float* columns, std::size_t rows, std::size_t start,
                 RowRange range);

// Fits every group of a matrix [inputs, rows].
Misfit fit_groups(const Fitter& fitter, const float* columns, std::size_t inputs,
                  std::size_t rows, Pool& pool);

// The statistics of row `first` and those that follow, in group `group` of all.
Statistic of_group(const Fitter& fitter, const Statistic& all, std::size_t group,
                   std::size_t rows, std::size_t first);

}  // namespace quantine
