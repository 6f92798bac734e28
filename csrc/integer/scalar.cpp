// The meaning of the kernels of integer products in plain C++.
#include <cmath>

#include "base/lanes.h"
#include "integer/level.h"

namespace quantine {
namespace {

constexpr std::size_t kOutputs = 16, kQuad = 4;

bool round(const float* x, const Codes& a, const float* scales, const float* zeros, bool one,
           float top, std::uint8_t* codes, std::int32_t* sums) {
  bool lost = false;
  for (std::size_t group = 0; group < a.groups; ++group) {
    const Span& span = a.spans[group];
    const float scale = scales[one ? 0 : group], zero = zeros[one ? 0 : group];
    std::int32_t sum = 0;
    for (std::size_t i = 0; i < span.width; ++i) {
      const float value = x[span.column + i];
      const int code = static_cast<int>(nearest_code(value / scale + zero, top));
      lost |= value != value;
      sum += code;
      codes[span.start + i] = static_cast<std::uint8_t>(code);
    }
    if (sums != nullptr) sums[group] = sum;
  }
  return lost;
}

void centre(const std::uint8_t* codes, std::size_t chunks, const std::uint8_t* offsets,
            std::int8_t* out, std::int32_t* sums) {
  for (std::size_t chunk = 0; chunk < chunks; ++chunk)
    for (std::size_t lane = 0; lane < kOutputs; ++lane)
      for (std::size_t k = 0; k < kQuad; ++k) {
        const std::size_t at = (chunk * kOutputs + lane) * kQuad + k;
        const int code = codes[at] - offsets[lane];
        out[at] = static_cast<std::int8_t>(code);
        sums[lane] += code;
      }
}

void multiply_row(const Panel& panel, std::size_t tile, const Codes& a, std::size_t row,
                  float* results) {
  const std::int8_t* weights = panel.codes + tile * a.stride * kOutputs;
  for (std::size_t lane = 0; lane < kOutputs; ++lane)
    results[lane] = panel.begin[tile * kOutputs + lane];
  for (std::size_t group = 0; group < a.groups; ++group) {
    const Span& span = a.spans[group];
    const std::uint8_t* x = a.codes + row * a.stride + span.start;
    const std::int8_t* w = weights + span.start * kOutputs;
    const std::size_t place = (tile * a.groups + group) * kOutputs;
    for (std::size_t lane = 0; lane < kOutputs; ++lane) {
      std::int32_t sum = 0;
      for (std::size_t i = 0; i < span.padded; ++i)
        sum += x[i] * w[i / kQuad * kQuad * kOutputs + lane * kQuad + i % kQuad];
      float whole = static_cast<float>(sum);
      if (panel.rests != nullptr)
        whole = std::fma(-panel.rests[place + lane], a.sums[row * a.groups + group], whole);
      results[lane] = std::fma(whole, panel.scales[place + lane], results[lane]);
    }
  }
}

void multiply(const Panel& panel, std::size_t tile, bool two, const Codes& a, std::size_t row,
              std::size_t rows, float* results) {
  for (std::size_t r = 0; r < rows; ++r)
    for (std::size_t t = 0; t < (two ? 2u : 1u); ++t)
      multiply_row(panel, tile + t, a, row + r, results + r * 2 * kOutputs + t * kOutputs);
}

}  // namespace

const IntegerLevel& integer_scalar() {
  static const IntegerLevel level = {"scalar", kQuad, kMostRows, round, centre, multiply};
  return level;
}

}  // namespace quantine
