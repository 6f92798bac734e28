// What kernels of integer products work on. Called only where the processor has their instructions;
// no library templates here, whose code other files would share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quantine {

constexpr std::size_t kMostRows = 96;  // of activations that meet a pair of tiles at once

// A group of inputs in rows of codes, which are padded to whole steps of a level.
struct Span {
  std::size_t column, width;  // stored columns
  std::size_t start, padded;  // inputs
};

// Activations as codes without a sign.
struct Codes {
  const Span* spans;          // [groups]
  std::size_t groups;
  std::size_t stride;         // padded inputs of a row
  const std::uint8_t* codes;  // [rows, stride]
  const float* sums;          // [rows, groups], of codes; null where no panel has rests
};

// Tiles of 16 outputs as codes with a sign, less a whole offset for each output and group.
struct Panel {
  const std::int8_t* codes;  // [tiles, stride / 4, 16, 4]
  const float* scales;       // [tiles, groups, 16]
  const float* rests;        // [tiles, groups, 16]: zero points less offsets; null: there are none
  const float* begin;        // [tiles, 16]: what results begin with
};

// One instruction set. For each group in order, with sums in 32 bits and fused multiply-adds,
//   result = fma(sum - rest * sums, scale, result)
struct IntegerLevel {
  const char* name;
  std::size_t step;  // inputs that groups are padded to: a multiple of 4
  std::size_t rows;  // of activations that best meet a pair of tiles at once, up to kMostRows
  // Codes of a row in stored order, and their sum in each group unless `sums` is null. Groups have
  // scales and zeros, or the row has one of each. Returns whether a value is NaN.
  bool (*round)(const float* x, const Codes& a, const float* scales, const float* zeros, bool one,
                float top, std::uint8_t* codes, std::int32_t* sums);
  // `chunks` of 64 codes less the offset of each output; adds their sums for each output.
  void (*centre)(const std::uint8_t* codes, std::size_t chunks, const std::uint8_t* offsets,
                 std::int8_t* out, std::int32_t* sums);
  // Results of one or two tiles for up to kMostRows `rows`: [rows, 32].
  void (*multiply)(const Panel& panel, std::size_t tile, bool two, const Codes& a, std::size_t row,
                   std::size_t rows, float* results);
};

const IntegerLevel& integer_scalar();
#if defined(QUANTINE_X86)
const IntegerLevel& integer_avx512();
#endif
#if defined(QUANTINE_ARM)
const IntegerLevel& integer_neon();
const IntegerLevel& integer_dotprod();
const IntegerLevel& integer_i8mm();
#endif
#if defined(QUANTINE_AMX)
const IntegerLevel& integer_amx();  // `allow_integer_tiles` said yes
bool allow_integer_tiles();
#endif

}  // namespace quantine
