// Activations as tiles meet them, for any vector type `V` of 16 lanes; see matrix_planes.h.
#pragma once

#include <cmath>

#include "matrix_level.h"
#include "matrix_planes.h"

namespace quantine {
namespace {

// A block of activations in 16 bit: its codes, their scale, and their sum, each times `weight(part)` of
// its 16. `values` has zeros behind the last.
template <typename V, typename Weight>
inline __attribute__((always_inline)) void round_block(float* values, const Block& block,
                                                       std::uint8_t* codes, float& scale, float& sum,
                                                       Weight&& weight) {
  const std::size_t parts = (block.width + kTile - 1) / kTile;
  typename V::Float widest = V::set(0.0f);
  for (std::size_t part = 0; part < parts; ++part)
    widest = V::larger(widest, V::magnitude(V::floats(values + part * kTile)));
  const float largest = V::largest(widest);  // NaN where one is
  // Below this the reciprocal of the scale overflows; what is lost is below 1e-33.
  const bool small = largest <= 1e-33f;
  const bool finite = largest <= 3.4028235e38f;
  if (!finite) std::memset(values, 0, parts * kTile * sizeof(float));  // the scale says it
  constexpr float kTop = static_cast<float>(kLargestCode);
  const auto inverse = V::set(small ? 0.0f : kTop / largest);
  alignas(64) std::uint8_t rounded[kBlock / kChunk * kChunkBytes];
  constexpr std::size_t kPartBytes = kTile / kChunk * kChunkBytes;
  typename V::Float total = V::set(0.0f);
  for (std::size_t part = 0; part < parts; ++part) {
    const auto whole =
        V::round(rounded + part * kPartBytes, V::mul(V::floats(values + part * kTile), inverse));
    total = V::fma(V::to_float(whole), weight(part), total);
  }
  std::memcpy(codes, rounded, block.chunks * kChunkBytes);
  scale = finite ? (small ? 0.0f : largest / kTop) : NAN;
  sum = V::sum(total);
}

// Copies a block of a row to `values`, with zeros behind the last.
template <typename V>
inline void copy_block(const float* x, const Block& block, float* values) {
  const std::size_t parts = (block.width + kTile - 1) / kTile;
  if (block.width % kTile != 0) V::store(values + (parts - 1) * kTile, V::set(0.0f));
  std::memcpy(values, x + block.first, block.width * sizeof(float));
}

// Activations of a row in 16 bit: codes, scale and sum of codes of every block.
template <typename V>
void round_row(const Weights& w, const float* x, std::uint8_t* codes, float* scales, float* sums) {
  for (std::size_t index = 0; index < w.blocks.size(); ++index) {
    const Block& block = w.blocks[index];
    alignas(64) float values[kBlock];
    copy_block<V>(x, block, values);
    round_block<V>(values, block, codes, scales[index], sums[index],
                   [](std::size_t) { return V::set(1.0f); });
    codes += block.chunks * kChunkBytes;
  }
}

// Rows of activations times the scales of a group of outputs, and what its zero points make of them.
template <typename V>
void scale_rows(const Weights& w, std::size_t group, const float* x, std::size_t rows,
                const ScaledRows& out) {
  const bool exact = out.spread != nullptr;
  const auto middle = V::set(static_cast<float>(1 << (w.bits - 1)));
  const auto unit = V::set(1.0f / static_cast<float>(1 << (w.bits - 1)));
  const std::size_t blocks = w.blocks.size(), row_bytes = w.padded / kChunk * kChunkBytes;
  Lines<V> lines(w, group);
  for (std::size_t row = 0; exact && row < rows; ++row) out.offsets[row] = 0.0f;
  for (std::size_t index = 0; index < blocks; ++index) {
    const Block& block = w.blocks[index];
    const std::size_t parts = (block.width + kTile - 1) / kTile;
    typename V::Float scale[kBlock / kTile], zero[kBlock / kTile];
    for (std::size_t part = 0; part < parts; ++part) {
      lines.advance(scale[part], zero[part]);
      zero[part] = exact ? V::sub(zero[part], middle) : V::mul(zero[part], unit);
    }
    for (std::size_t row = 0; row < rows; ++row) {
      alignas(64) float values[kBlock];
      copy_block<V>(x + row * w.columns, block, values);
      for (std::size_t part = 0; part < parts; ++part) {
        float* at = values + part * kTile;
        V::store(at, V::mul(V::floats(at), scale[part]));
      }
      if (exact) {
        typename V::Float offset = V::set(0.0f);
        for (std::size_t part = 0; part < parts; ++part)
          offset = V::fma(V::floats(values + part * kTile), zero[part], offset);
        out.offsets[row] += V::sum(offset);
        std::memcpy(out.spread + row * w.padded + block.first, values, block.width * sizeof(float));
      } else {
        const std::size_t place = row * blocks + index;
        round_block<V>(values, block, out.codes + row * row_bytes + block.first / kChunk * kChunkBytes,
                       out.scales[place], out.sums[place],
                       [&](std::size_t part) { return zero[part]; });
      }
    }
  }
}

}  // namespace
}  // namespace quantine
