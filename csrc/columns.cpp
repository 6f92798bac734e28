#include "columns.h"

#include <algorithm>
#include <cmath>
#include <limits>

// The loops are plain C++; compilers vectorize them over rows, once for each instruction set.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__)
#define QUANTINE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define QUANTINE_CLONES
#endif

namespace quantine {
namespace {

constexpr std::size_t kLanes = 64;    // rows in registers while a grid is tried
constexpr std::size_t kChunk = 256;   // rows whose columns stay in cache while they are rounded
constexpr float kLargestHalf = 65504.0f;

// `x` rounded to float16, to even on ties; exact for what float16 holds, subnormal or not.
inline float to_half(float x) {
  // Adding and subtracting a power of two leaves the wanted number of bits.
  const float magnitude = std::fabs(x);
  const float exponent = std::max(magnitude, 6.103515625e-05f);
  union {
    float value;
    std::uint32_t bits;
  } unit{exponent};
  unit.bits &= 0x7f800000u;                       // the power of two at or below
  const float shift = unit.value * 8192.0f * 1.5f;  // 2^13: float32 has 13 bits more
  const float rounded = (magnitude + shift) - shift;
  return std::copysign(rounded, x);
}

QUANTINE_CLONES
void cheapest_of_lanes(const float* columns, std::size_t stride, const float* importance,
                       const float* scales, const float* zeros, std::int64_t* best, std::size_t n,
                       std::size_t rows, std::size_t candidates, float top, float price,
                       std::size_t lanes) {
  float least[kLanes];
  std::int32_t index[kLanes];
  for (std::size_t r = 0; r < lanes; ++r) {
    least[r] = std::numeric_limits<float>::infinity();
    index[r] = 0;
  }
  for (std::size_t k = 0; k < candidates; ++k) {
    float cost[kLanes] = {};
    const float* scale = scales + k * rows;
    const float* zero = zeros + k * rows;
    for (std::size_t j = 0; j < n; ++j) {
      const float* column = columns + j * stride;
      const float weight = importance[j];
      for (std::size_t r = 0; r < lanes; ++r) {
        float code = std::nearbyint(column[r] / scale[r] + zero[r]);
        code = std::min(std::max(code, 0.0f), top);
        const float error = (code - zero[r]) * scale[r] - column[r];
        cost[r] += std::min(error * error * weight, price);
      }
    }
    for (std::size_t r = 0; r < lanes; ++r) {
      const bool better = cost[r] < least[r];
      least[r] = better ? cost[r] : least[r];
      index[r] = better ? static_cast<std::int32_t>(k) : index[r];
    }
  }
  for (std::size_t r = 0; r < lanes; ++r) best[r] = index[r];
}

QUANTINE_CLONES
void round_chunk(float* current, const float* local, const float* scales, const float* zeros,
                 std::size_t grid_stride, std::uint8_t* codes, float* errors, std::uint8_t* kept,
                 std::size_t n, std::size_t rows, float top, float price, std::size_t width) {
  for (std::size_t j = 0; j < n; ++j) {
    float* column = current + j * rows;
    const float* scale = scales + j * grid_stride;
    const float* zero = zeros + j * grid_stride;
    std::uint8_t* code_out = codes + j * rows;
    float* error_out = errors + j * rows;
    const float diagonal = local[j * n + j];
    for (std::size_t r = 0; r < width; ++r) {
      float code = std::nearbyint(column[r] / scale[r] + zero[r]);
      code = std::min(std::max(code, 0.0f), top);
      code_out[r] = static_cast<std::uint8_t>(static_cast<std::int32_t>(code));
      error_out[r] = (column[r] - (code - zero[r]) * scale[r]) / diagonal;
    }
    if (kept != nullptr) {
      std::uint8_t* kept_out = kept + j * rows;
      for (std::size_t r = 0; r < width; ++r) {
        const float exact = to_half(column[r]);
        const float lost = (column[r] - exact) / diagonal;
        const bool keep = error_out[r] * error_out[r] > price &&
                          std::fabs(lost) < std::fabs(error_out[r]) &&
                          std::fabs(exact) <= kLargestHalf;
        error_out[r] = keep ? lost : error_out[r];
        kept_out[r] = keep ? 1 : 0;
      }
    }
    for (std::size_t i = j + 1; i < n; ++i) {
      float* behind = current + i * rows;
      const float factor = local[j * n + i];
      for (std::size_t r = 0; r < width; ++r) behind[r] -= factor * error_out[r];
    }
  }
}

}  // namespace

void cheapest_grids(const float* columns, std::size_t stride, const float* importance,
                    const float* scales, const float* zeros, std::int64_t* best, std::size_t n,
                    std::size_t rows, std::size_t candidates, int bits, float price) {
  const float top = static_cast<float>((1 << bits) - 1);
  for (std::size_t r = 0; r < rows; r += kLanes)
    cheapest_of_lanes(columns + r, stride, importance, scales + r, zeros + r, best + r, n, rows,
                      candidates, top, price, std::min(kLanes, rows - r));
}

void round_columns(float* current, const float* local, const float* scales, const float* zeros,
                   std::size_t grid_stride, std::uint8_t* codes, float* errors, std::uint8_t* kept,
                   std::size_t n, std::size_t rows, int bits, float price) {
  const float top = static_cast<float>((1 << bits) - 1);
  for (std::size_t r = 0; r < rows; r += kChunk)
    round_chunk(current + r, local, scales + r, zeros + r, grid_stride, codes + r, errors + r,
                kept == nullptr ? nullptr : kept + r, n, rows, top, price,
                std::min(kChunk, rows - r));
}

}  // namespace quantine
