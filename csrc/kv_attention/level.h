// What an instruction set has to offer for attention over packed codes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quantine {

constexpr std::size_t kStateLanes = 16;    // rows of floats are padded to a multiple of this
constexpr std::size_t kStateQueries = 4;   // that meet decoded codes at once
constexpr std::size_t kStateOverread = 16; // bytes behind the last row that kernels may read

// The packed rows of some tokens of one head.
struct StateRows {
  const std::uint8_t* codes;
  std::size_t stride;  // bytes
  std::size_t tokens;
  std::size_t width;   // channels, padded
  int bits;
};

struct StateLevel {
  const char* name;
  // scores[q][token] = codes[token] . queries[q] - offsets[q]; queries [count, width], at most
  // kStateQueries, zero where padded.
  void (*score)(const StateRows& rows, const float* queries, const float* offsets,
                std::size_t count, float* scores, std::size_t stride);
  // sums[q] = sum of weights[q][token] * codes[token]; sums [count, width], rubbish where padded.
  void (*mix)(const StateRows& rows, const float* weights, std::size_t stride, std::size_t count,
              float* sums);
};

const StateLevel& scalar_state_level();
#if defined(QUANTINE_X86)
const StateLevel& avx2_state_level();
const StateLevel& avx512_state_level();
#endif
#if defined(QUANTINE_ARM)
const StateLevel& neon_state_level();
#endif

}  // namespace quantine
