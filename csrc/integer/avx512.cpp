// Compiled for AVX-512 with VNNI; called only where the processor has it.
#include <immintrin.h>

#include <cstring>

#include "integer/avx512.h"

namespace quantine {
namespace {

constexpr std::size_t kLanes = 16, kQuad = 4, kVector = 64;

// Of four codes without a sign with four that have one. GCC 12 would copy each sum twice around the
// intrinsic function.
inline __attribute__((always_inline)) void add_products(__m512i& sum, __m512i codes,
                                                        __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(weights));
}

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
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < kTiles; ++t) sum[r][t] = _mm512_setzero_si512();
    for (std::size_t i = 0; i < span.padded; i += kQuad, w += kVector) {
      __m512i weights[kTiles];
      for (int t = 0; t < kTiles; ++t)
        weights[t] = _mm512_load_si512(w + static_cast<std::size_t>(t) * stride * kLanes);
      for (int r = 0; r < kRows; ++r) {
        std::int32_t word;
        std::memcpy(&word, x + static_cast<std::size_t>(r) * stride + i, sizeof word);
        const __m512i four = _mm512_set1_epi32(word);
        for (int t = 0; t < kTiles; ++t) add_products(sum[r][t], four, weights[t]);
      }
    }
    for (int t = 0; t < kTiles; ++t) {
      const std::size_t place = ((tile + t) * a.groups + group) * kLanes;
      const __m512 scale = _mm512_loadu_ps(panel.scales + place);
      for (int r = 0; r < kRows; ++r) {
        __m512 whole = _mm512_cvtepi32_ps(sum[r][t]);
        if (panel.rests != nullptr) {
          const float codes = a.sums[(row + static_cast<std::size_t>(r)) * a.groups + group];
          whole = _mm512_fnmadd_ps(_mm512_loadu_ps(panel.rests + place), _mm512_set1_ps(codes),
                                   whole);
        }
        total[r][t] = _mm512_fmadd_ps(whole, scale, total[r][t]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTiles; ++t)
      _mm512_storeu_ps(results + static_cast<std::size_t>(r) * 2 * kLanes + t * kLanes,
                       total[r][t]);
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

bool round_avx512(const float* x, const Codes& a, const float* scales, const float* zeros, bool one,
                  float top, std::uint8_t* codes, std::int32_t* sums) {
  const __m512 least = _mm512_setzero_ps(), most = _mm512_set1_ps(top);
  __mmask16 lost = 0;
  for (std::size_t group = 0; group < a.groups; ++group) {
    const Span& span = a.spans[group];
    const __m512 scale = _mm512_set1_ps(scales[one ? 0 : group]);
    const __m512 zero = _mm512_set1_ps(zeros[one ? 0 : group]);
    const float* from = x + span.column;
    std::uint8_t* to = codes + span.start;
    __m512i sum = _mm512_setzero_si512();
    for (std::size_t i = 0; i < span.width; i += kLanes) {
      const std::size_t left = span.width - i;
      const __mmask16 some = static_cast<__mmask16>(left >= kLanes ? 0xffffu : (1u << left) - 1);
      const __m512 value = _mm512_maskz_loadu_ps(some, from + i);
      lost |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
      const __m512 place = _mm512_add_ps(_mm512_div_ps(value, scale), zero);
      // Of NaN and a number, the second is taken.
      const __m512 within = _mm512_min_ps(_mm512_max_ps(place, least), most);
      const __m512i code = _mm512_maskz_cvtps_epi32(some, within);
      sum = _mm512_add_epi32(sum, code);
      _mm_mask_storeu_epi8(to + i, some, _mm512_cvtepi32_epi8(code));
    }
    if (sums != nullptr) sums[group] = _mm512_reduce_add_epi32(sum);
  }
  return lost != 0;
}

void centre_avx512(const std::uint8_t* codes, std::size_t chunks, const std::uint8_t* offsets,
                   std::int8_t* out, std::int32_t* sums) {
  // Each lane of 32 bits holds four codes of an output.
  const __m512i wide =
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(offsets)));
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
  static const IntegerLevel level = {"avx512",     kQuad,         kMostRows,
                                     round_avx512, centre_avx512, multiply_avx512};
  return level;
}

}  // namespace quantine
