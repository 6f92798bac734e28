// Compiled for AVX-512 with VNNI; called only where the processor has it.
#include <immintrin.h>

#include <cstring>

#include "integer_avx512.h"

namespace quantine {
namespace {

constexpr std::size_t kLanes = 16, kQuad = 4, kVector = 64;

// `kRows` rows of activations meet `kTiles` tiles.
template <int kRows, int kTiles>
void multiply_rows(const Panel& panel, std::size_t tile, const Codes& a, std::size_t row,
                   float* results) {
  __m512 total[kRows][kTiles];
  for (int t = 0; t < kTiles; ++t) {
    const __m512 begin = _mm512_loadu_ps(panel.begin + (tile + t) * kLanes);
    for (int r = 0; r < kRows; ++r) total[r][t] = begin;
  }
  const std::size_t stride = a.stride;
  for (std::size_t group = 0; group < a.groups; ++group) {
    const Span& span = a.spans[group];
    const std::uint8_t* x = a.codes + row * stride + span.start;
    const std::int8_t* w = panel.codes + (tile * stride + span.start) * kLanes;
    __m512i sum[kRows][kTiles];
    for (int t = 0; t < kTiles; ++t) {
      const __m512i first = _mm512_loadu_si512(panel.first + ((tile + t) * a.groups + group) * kLanes);
      for (int r = 0; r < kRows; ++r) sum[r][t] = first;
    }
    for (std::size_t i = 0; i < span.padded; i += kQuad, w += kVector) {
      __m512i weights[kTiles];
      for (int t = 0; t < kTiles; ++t)
        weights[t] = _mm512_load_si512(w + static_cast<std::size_t>(t) * stride * kLanes);
      for (int r = 0; r < kRows; ++r) {
        std::int32_t word;
        std::memcpy(&word, x + static_cast<std::size_t>(r) * stride + i, sizeof word);
        const __m512i four = _mm512_set1_epi32(word);
        for (int t = 0; t < kTiles; ++t) sum[r][t] = _mm512_dpbusd_epi32(sum[r][t], four, weights[t]);
      }
    }
    for (int t = 0; t < kTiles; ++t) {
      const std::size_t place = ((tile + t) * a.groups + group) * kLanes;
      const __m512 scale = _mm512_loadu_ps(panel.scales + place);
      for (int r = 0; r < kRows; ++r) {
        __m512 whole = _mm512_cvtepi32_ps(sum[r][t]);
        if (panel.rests != nullptr) {
          const float codes = a.sums[(row + static_cast<std::size_t>(r)) * a.groups + group];
          whole = _mm512_fnmadd_ps(_mm512_loadu_ps(panel.rests + place), _mm512_set1_ps(codes), whole);
        }
        total[r][t] = _mm512_fmadd_ps(whole, scale, total[r][t]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTiles; ++t)
      _mm512_storeu_ps(results + static_cast<std::size_t>(r) * 2 * kLanes + t * kLanes, total[r][t]);
}

template <int kTiles>
void multiply_tiles(const Panel& panel, std::size_t tile, const Codes& a, std::size_t row,
                    std::size_t rows, float* results) {
  constexpr std::size_t kMost = 6;  // sums and totals stay in registers
  for (; rows >= kMost; rows -= kMost, row += kMost, results += kMost * 2 * kLanes)
    multiply_rows<kMost, kTiles>(panel, tile, a, row, results);
  if (rows >= 4) {
    multiply_rows<4, kTiles>(panel, tile, a, row, results);
    rows -= 4, row += 4, results += 4 * 2 * kLanes;
  }
  for (; rows > 0; --rows, ++row, results += 2 * kLanes)
    multiply_rows<1, kTiles>(panel, tile, a, row, results);
}

}  // namespace

void multiply_avx512(const Panel& panel, std::size_t tile, bool two, const Codes& a,
                     std::size_t row, std::size_t rows, float* results) {
  if (two) multiply_tiles<2>(panel, tile, a, row, rows, results);
  else multiply_tiles<1>(panel, tile, a, row, rows, results);
}

void centre_avx512(const std::uint8_t* codes, std::size_t chunks, const std::uint8_t* offsets,
                   std::int8_t* out, std::int32_t* sums) {
  // Each lane of 32 bits holds four codes of an output.
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(offsets)));
  const __m512i offset = _mm512_mullo_epi32(wide, _mm512_set1_epi32(0x01010101));
  __m512i sum = _mm512_loadu_si512(sums);
  for (std::size_t chunk = 0; chunk < chunks; ++chunk) {
    const __m512i code = _mm512_sub_epi8(_mm512_loadu_si512(codes + chunk * kVector), offset);
    _mm512_storeu_si512(out + chunk * kVector, code);
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), code);
  }
  _mm512_storeu_si512(sums, sum);
}

const IntegerLevel& integer_avx512() {
  static const IntegerLevel level = {"avx512", kQuad, centre_avx512, multiply_avx512};
  return level;
}

}  // namespace quantine
