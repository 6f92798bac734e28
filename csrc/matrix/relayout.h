// From a QTensor, whose arrays are as in files, to the order in which kernels read a matrix.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "matrix/matrix.h"

namespace quantine {

// Scales or zero points as a QTensor has them; pointers that do not belong to `kept` are null.
// Lines are rows, or columns where groups run along outputs.
struct StatisticSource {
  Kept kept = Kept::kMiddle;
  const std::uint16_t* halves = nullptr;  // [lines, groups]; kHalf
  const std::uint8_t* codes = nullptr;    // [groups, lines]; kCoded. [lines, groups]; kWhole
  int bits = 0;                           // of codes
  const std::uint16_t* steps = nullptr;   // [groups, spans] float16; kCoded
  const std::uint16_t* zeros = nullptr;   // likewise
  std::size_t span = 0;                   // lines that share a second grid; kCoded
  float factor = 1.0f;                    // of every value; kHalf and kCoded
};

// A QTensor: row-major arrays, columns in stored order.
struct Source {
  std::size_t rows = 0, columns = 0, group_size = 0;
  std::vector<std::size_t> ends;  // of groups of columns that differ in size; else empty
  bool along_outputs = false;  // groups
  int bits = 0;
  const std::uint8_t* codes = nullptr;  // [rows, columns]
  StatisticSource scale, zero;
  const std::int64_t* order = nullptr;            // [columns] or null
  const std::int64_t* outlier_offsets = nullptr;  // [rows + 1] or null
  const std::int64_t* outlier_columns = nullptr;
  const std::uint16_t* outlier_halves = nullptr;  // either these
  const float* outlier_floats = nullptr;          // or these
};

// The same matrix in the order in which kernels read it.
Weights relayout(const Source& source, Pool& pool);

// A matrix that is not quantized, `[rows, columns]` in float16 or float32.
Weights relayout(const std::uint16_t* values, std::size_t rows, std::size_t columns, Pool& pool);
Weights relayout(const float* values, std::size_t rows, std::size_t columns, Pool& pool);

}  // namespace quantine
