// Compiled for AMX with bfloat16, and AVX-512 to pack what tiles take; called only where the
// processor has them.
#include "gram/amx.h"

#include <immintrin.h>

#include "base/amx.h"

namespace quantine {
namespace {

// Two tokens of up to 16 columns, pair by pair.
__m512i pairs(const std::uint16_t* x, std::size_t tokens, std::size_t inputs, __mmask16 columns) {
  if (tokens == 0) return _mm512_setzero_si512();
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, x));
  if (tokens == 1) return low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(columns, x + inputs));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Writes rows [16] of 16 numbers as columns.
void transpose(const __m512i* rows, std::uint32_t* out) {
  __m512i pair[16], four[16];
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pair[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  // Of rows 4b to 4b + 3, four[4b + c] holds columns c, 4 + c, 8 + c and 12 + c.
  for (int b = 0; b < 16; b += 4) {
    four[b] = _mm512_unpacklo_epi64(pair[b], pair[b + 2]);
    four[b + 1] = _mm512_unpackhi_epi64(pair[b], pair[b + 2]);
    four[b + 2] = _mm512_unpacklo_epi64(pair[b + 1], pair[b + 3]);
    four[b + 3] = _mm512_unpackhi_epi64(pair[b + 1], pair[b + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512i even_low = _mm512_shuffle_i32x4(four[c], four[4 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(four[c], four[4 + c], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(four[8 + c], four[12 + c], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(four[8 + c], four[12 + c], 0xdd);
    const auto put = [&](int column, __m512i value) {
      _mm512_store_si512(out + column * 16, value);
    };
    put(c, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    put(4 + c, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    put(8 + c, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    put(12 + c, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
}

}  // namespace

bool allow_tiles() { return ask_for_tiles(kHasBfloat16Tiles); }

void pack_step(const std::uint16_t* x, std::size_t tokens, std::size_t inputs, std::size_t first,
               PackedStep& packed) {
  for (std::size_t half = 0; half < 2; ++half) {
    const std::size_t begin = first + half * 16;
    const std::size_t left = begin < inputs ? inputs - begin : 0;
    const __mmask16 columns = left < 16 ? static_cast<__mmask16>((1u << left) - 1) : 0xffff;
    __m512i rows[16];
    for (std::size_t pair = 0; pair < kStep / 2; ++pair) {
      const std::size_t token = 2 * pair, rest = token < tokens ? tokens - token : 0;
      rows[pair] = columns == 0 ? _mm512_setzero_si512()
                                : pairs(x + token * inputs + begin, rest, inputs, columns);
      _mm512_store_si512(packed.right[half].at + pair * 16, rows[pair]);
    }
    transpose(rows, packed.left[half].at);
  }
}

void multiply_strips(const PackedStep* left, const PackedStep* right, std::size_t strips,
                     std::size_t steps, float* products) {
  const TileConfiguration configuration;
  _tile_loadconfig(&configuration);
  for (std::size_t strip = 0; strip < strips; ++strip) {
    const PackedStep* other = right + strip * steps;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::size_t step = 0; step < steps; ++step) {
      _tile_loadd(4, left[step].left[0].at, 64);
      _tile_loadd(5, left[step].left[1].at, 64);
      _tile_loadd(6, other[step].right[0].at, 64);
      _tile_loadd(7, other[step].right[1].at, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    float* product = products + strip * kStrip * kStrip;
    constexpr std::size_t kRowBytes = kStrip * sizeof(float);
    _tile_stored(0, product, kRowBytes);
    _tile_stored(1, product + 16, kRowBytes);
    _tile_stored(2, product + 16 * kStrip, kRowBytes);
    _tile_stored(3, product + 16 * kStrip + 16, kRowBytes);
  }
  _tile_release();
}

}  // namespace quantine
