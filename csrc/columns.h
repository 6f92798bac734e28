// Loops of the solvers. Matrices are transposed, [inputs, rows]: rows, the outputs, are contiguous
// and independent of one another.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quantine {

// For each row the candidate grid with the least sum over n weights of
// min(error^2 * importance, price). On a tie the first wins.
//
//   columns     [n, rows], consecutive inputs `stride` floats apart
//   importance  [n]
//   scales, zeros  [candidates, rows]
//   best        [rows], gets the index of a candidate
void cheapest_grids(const float* columns, std::size_t stride, const float* importance,
                    const float* scales, const float* zeros, std::int64_t* best, std::size_t n,
                    std::size_t rows, std::size_t candidates, int bits, float price);

// Rounds n columns one after another and takes what each loses off those behind it.
//
//   current  [n, rows], in place: the weights as they were when they were rounded
//   local    [n, n] upper triangular factor
//   scales, zeros  [n, rows], consecutive inputs `grid_stride` floats apart (0: one for all)
//   codes    [n, rows]; errors [n, rows], divided by the factor's diagonal
//   kept     [n, rows] of 0 and 1: weights whose squared error exceeds `price`, and to which
//            float16 is nearer; may be null
void round_columns(float* current, const float* local, const float* scales, const float* zeros,
                   std::size_t grid_stride, std::uint8_t* codes, float* errors, std::uint8_t* kept,
                   std::size_t n, std::size_t rows, int bits, float price);

}  // namespace quantine
