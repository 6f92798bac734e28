// The column loop of the solvers. Matrices are transposed, [inputs, rows]: rows, the outputs, are
// contiguous, and independent of one another unless they are coupled.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fit/fit.h"

namespace quantine {

// A matrix whose columns are rounded one after another, and the grids it is rounded to.
struct Columns {
  float* weights;              // [inputs, rows]; each ends as it was when it was rounded
  const float* upper;          // [inputs, inputs], the factor of the inverse Hessian
  const std::int64_t* groups;  // [inputs], each input's row of scales and zeros
  const float* scales;         // [groups, rows]
  const float* zeros;          // [groups, rows]
  std::uint8_t* codes;         // [inputs, rows]
  float* errors;               // [inputs, rows], divided by the factor's diagonal
  std::uint8_t* kept;          // [inputs, rows] of 0 and 1, or null: weights whose squared error
                               // exceeds `price`, and to which float16 is nearer
  std::size_t inputs, rows;
  int bits;
  float price;
  const float* coupling;       // [rows, run], what an error of each row asks of those before it in
                               // its run; null where rows do not make up for each other
  std::size_t run;             // rows that make up for each other, from the last to the first
};

// Rounds columns from `start` to `stop`, taking what each loses off those up to `stop`. A group
// that is fitted starts at `start`, or is whole between the two. `fitter`, whose groups ascend, is
// null where grids are known. Of one whose groups run along outputs, statistics are those of every
// column, and the grids of `columns` are not looked at. Runs of rows are independent of one
// another: results are the same for any number of threads.
Misfit round_block(const Columns& columns, std::size_t start, std::size_t stop,
                   const Fitter* fitter, Pool& pool);

}  // namespace quantine
