// The meaning of the kernels of integer products in plain C++.
#include <cmath>

#include "integer_level.h"

namespace quantine {
namespace {

constexpr std::size_t kLanes = 16, kQuad = 4;

void centre(const std::uint8_t* codes, std::size_t chunks, const std::uint8_t* offsets,
            std::int8_t* out, std::int32_t* sums) {
  for (std::size_t chunk = 0; chunk < chunks; ++chunk)
    for (std::size_t lane = 0; lane < kLanes; ++lane)
      for (std::size_t k = 0; k < kQuad; ++k) {
        const std::size_t at = (chunk * kLanes + lane) * kQuad + k;
        const int code = codes[at] - offsets[lane];
        out[at] = static_cast<std::int8_t>(code);
        sums[lane] += code;
      }
}

void multiply_row(const Panel& panel, std::size_t tile, const Codes& a, std::size_t row,
                  float* results) {
  const std::int8_t* weights = panel.codes + tile * a.stride * kLanes;
  for (std::size_t lane = 0; lane < kLanes; ++lane) results[lane] = panel.begin[tile * kLanes + lane];
  for (std::size_t group = 0; group < a.groups; ++group) {
    const Span& span = a.spans[group];
    const std::uint8_t* x = a.codes + row * a.stride + span.start;
    const std::int8_t* w = weights + span.start * kLanes;
    const std::size_t place = (tile * a.groups + group) * kLanes;
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      std::int32_t sum = panel.first[place + lane];
      for (std::size_t i = 0; i < span.padded; ++i)
        sum += x[i] * w[i / kQuad * kQuad * kLanes + lane * kQuad + i % kQuad];
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
      multiply_row(panel, tile + t, a, row + r, results + r * 2 * kLanes + t * kLanes);
}

}  // namespace

const IntegerLevel& integer_scalar() {
  static const IntegerLevel level = {"scalar", kQuad, centre, multiply};
  return level;
}

}  // namespace quantine
