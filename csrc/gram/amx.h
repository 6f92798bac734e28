// Products of strips of columns by AMX, for gram.cpp. Called only where the processor has it and
// AVX-512; no library templates here, whose code other files would share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quantine {

constexpr std::size_t kStrip = 32;  // columns of a strip: two tiles
constexpr std::size_t kStep = 32;   // tokens of a tile

// 16 columns by 16 pairs of tokens in bfloat16; the earlier token is in the lower half.
struct alignas(64) PairTile {
  std::uint32_t at[256];
};

// A step of a strip: its two tiles as right factors, pairs by columns, and as left ones, columns by
// pairs.
struct PackedStep {
  PairTile right[2], left[2];
};

// Asks the system for tiles; false where there are none.
bool allow_tiles();

// Packs kStep tokens of the columns of `x` [tokens, inputs] from `first`; beyond the ends is zero.
void pack_step(const std::uint16_t* x, std::size_t tokens, std::size_t inputs, std::size_t first,
               PackedStep& packed);

// products[s] [kStrip, kStrip] = left^T right[s] over all steps, for `strips` strips of `steps`.
void multiply_strips(const PackedStep* left, const PackedStep* right, std::size_t strips,
                     std::size_t steps, float* products);

}  // namespace quantine
