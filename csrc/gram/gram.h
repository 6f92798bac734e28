// Sums of x x^T over tokens, for inputs in bfloat16. The meaning is
// quantine.kernels.gram.reference. Only built where the compiler knows AMX.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/pool.h"

namespace quantine {

// Whether this processor multiplies tiles of bfloat16 (AMX), and the system lets it.
bool multiplies_tiles();

// Adds to `total` [inputs, inputs] the products of `x` [tokens, inputs], summed in float32. The
// sums are made in the same order for any number of threads. Only where `multiplies_tiles`.
void add_gram(const std::uint16_t* x, std::size_t tokens, std::size_t inputs, float* total,
              Pool& pool);

}  // namespace quantine
