// What the kernels for AMX share with those for AVX-512.
#pragma once

#include "integer/level.h"

namespace quantine {

// See IntegerLevel.
bool round_avx512(const float* x, const Codes& a, const float* scales, const float* zeros, bool one,
                  float top, std::uint8_t* codes, std::int32_t* sums);
void centre_avx512(const std::uint8_t* codes, std::size_t chunks, const std::uint8_t* offsets,
                   std::int8_t* out, std::int32_t* sums);
void multiply_avx512(const Panel& panel, std::size_t tile, bool two, const Codes& a,
                     std::size_t row, std::size_t rows, float* results);

}  // namespace quantine
