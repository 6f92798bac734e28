// What the kernels for AMX share with those for AVX-512.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quantine {

// See IntegerLevel.
void centre_avx512(const std::uint8_t* codes, std::size_t chunks, const std::uint8_t* offsets,
                   std::int8_t* out, std::int32_t* sums);

}  // namespace quantine
