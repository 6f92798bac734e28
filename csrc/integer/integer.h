// Products of packed weights with activations that are rounded to 8 bits or fewer, in integers. The
// meaning is quantine.kernels.integer.multiply_reference; see docs/kernels.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/pool.h"
#include "matrix/matrix.h"

namespace quantine {

// Inputs of a group of weights, at most: no sum of products of codes overflows 32 bits.
constexpr std::size_t kLongestGroup = (1u << 31) / (128 * 255) - 1;

// How inputs are rounded: `scale` and `zero` for each group of weights, or none, where every row of
// activations has the grid of its own range. Where there are `above` and `below`, a row is divided
// by its factor first: the largest product of a value with that of its group.
struct InputGrid {
  int bits = 8;
  std::vector<float> scale, zero, above, below;
};

// The instruction sets this machine has for these products, the best one first. All find the same
// bits.
std::vector<std::string> integer_levels();

// y [batch, rows] = x [batch, columns] times the matrix, whose groups run along inputs. A row of
// `x` with NaN, or without a finite range where it has a grid of its own, becomes NaN. Throws
// std::invalid_argument for an unknown `level`.
void multiply_integer(const Matrix& matrix, const InputGrid& grid, const float* x,
                      std::size_t batch, float* y, const std::string& level, Pool& pool);

// y [batch, columns]: the floats that the codes of `x` stand for, times the factors of rows.
// `ends[g]` is the input after the last one on the grid of scale g; where rows have grids of their
// own, all inputs are before `ends[0]`. Rows become NaN as in `multiply_integer`.
void round_inputs(const InputGrid& grid, const std::vector<std::size_t>& ends, const float* x,
                  std::size_t batch, float* y, Pool& pool);

// The codes that are multiplied, [batch, columns] in stored order.
void integer_codes(const Matrix& matrix, const InputGrid& grid, const float* x, std::size_t batch,
                   std::uint8_t* codes, Pool& pool);

}  // namespace quantine
