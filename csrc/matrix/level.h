// What an instruction set has to offer for products with matrices. scalar.cpp and
// the files named after instruction sets make one each.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix/matrix.h"

namespace quantine {

// Where activations that were scaled for a group of outputs go: as Activations has them, either
// codes or floats.
struct ScaledRows {
  std::uint8_t* codes = nullptr;
  float *scales = nullptr, *spread = nullptr, *offsets = nullptr;
};

// The kernels of one instruction set.
struct Level {
  const char* name;
  // Rows `tile * 16` and following of `y` `[batch, rows]`, from the first lane of `a` on.
  void (*multiply)(const Weights& w, const Activations& a, std::size_t batch, std::size_t tile,
                   float* y, bool exact);
  // Rounds a row of activations to 16 bit; the order of its codes is for `multiply` to know.
  void (*round)(const Weights& w, const float* x, std::uint8_t* codes, float* scales, float* sums);
  // Rows of activations `[rows, columns]` times the scales of a group of outputs.
  void (*scale)(const Weights& w, std::size_t group, const float* x, std::size_t rows,
                const ScaledRows& out);
  // The 16 rows of a tile in stored order, `stride` apart; all as if in group `group` of outputs.
  void (*decode)(const Weights& w, std::size_t tile, std::size_t group, float* out,
                 std::size_t stride);
  void (*decode_bfloat16)(const Weights& w, std::size_t tile, std::size_t group,
                          std::uint16_t* out, std::size_t stride);
  // The codes of a tile, one byte each, `[padded / 4, 16, 4]`, and its statistics `[groups, 16]`.
  void (*unpack)(const Weights& w, std::size_t tile, std::uint8_t* codes, float* scales,
                 float* zeros);
};

const Level& current_level();

const Level& scalar_level();
#if defined(QUANTINE_X86)
const Level& avx2_level();
const Level& avx512_level();
#endif
#if defined(QUANTINE_ARM)
const Level& neon_level();
const Level& dotprod_level();
const Level& i8mm_level();
#endif

}  // namespace quantine
