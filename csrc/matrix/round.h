// Activations as tiles meet them, rounded or scaled, for any vector type `V` of 16 lanes; see
// planes.h.
#pragma once

#include <algorithm>
#include <cmath>

#include "matrix/level.h"
#include "matrix/planes.h"

namespace quantine {
namespace {

// Calls `work` with the vectors that a block fills as a constant: all is in registers then.
template <typename F>
inline void with_parts(const Block& block, F&& work) {
  switch ((block.width + kTile - 1) / kTile) {
    case 1:
      return work(std::integral_constant<int, 1>{});
    case 2:
      return work(std::integral_constant<int, 2>{});
    case 3:
      return work(std::integral_constant<int, 3>{});
    default:
      return work(std::integral_constant<int, 4>{});
  }
}

// A block of a row, with zeros behind the last.
template <typename V, int kParts>
inline __attribute__((always_inline)) void load_block(const float* x, const Block& block,
                                                      typename V::Float (&values)[kParts]) {
  const float* from = x + block.first;
  alignas(64) float copy[kParts * kTile];
  if (block.width != kParts * kTile) {
    V::store(copy + (kParts - 1) * kTile, V::set(0.0f));
    std::memcpy(copy, from, block.width * sizeof(float));
    from = copy;
  }
  unroll<kParts>([&](auto part) { values[part] = V::floats(from + part * kTile); });
}

// A block of activations in 16 bit: its codes, their scale, and their sum, each times its weight.
template <typename V, int kParts>
inline __attribute__((always_inline)) void round_block(typename V::Float (&values)[kParts],
                                                       const typename V::Float (&weights)[kParts],
                                                       std::uint8_t* codes, float& scale,
                                                       float& sum) {
  typename V::Float widest = V::magnitude(values[0]);
  for (int part = 1; part < kParts; ++part)
    widest = V::larger(widest, V::magnitude(values[part]));
  const float largest = V::largest(widest);  // NaN where one is
  // Below this the reciprocal of the scale overflows; what is lost is below 1e-33.
  const bool small = largest <= 1e-33f;
  const bool finite = largest <= 3.4028235e38f;
  if (!finite)  // the scale says it
    for (int part = 0; part < kParts; ++part) values[part] = V::set(0.0f);
  constexpr float kTop = static_cast<float>(kLargestCode);
  const auto inverse = V::set(small ? 0.0f : kTop / largest);
  constexpr std::size_t kPartBytes = kTile / kChunk * kChunkBytes;
  typename V::Float total = V::set(0.0f);
  unroll<kParts>([&](auto part) {
    const auto whole = V::round(codes + part * kPartBytes, V::mul(values[part], inverse));
    total = V::fma(V::to_float(whole), weights[part], total);
  });
  scale = finite ? (small ? 0.0f : largest / kTop) : NAN;
  sum = V::sum(total);
}

// Activations of a row in 16 bit: codes, scale and sum of codes of every block.
template <typename V>
void round_row(const Weights& w, const float* x, std::uint8_t* codes, float* scales, float* sums) {
  for (std::size_t index = 0; index < w.blocks.size(); ++index) {
    const Block& block = w.blocks[index];
    const std::size_t bytes = block.chunks * kChunkBytes;
    with_parts(block, [&](auto parts) {
      typename V::Float values[parts], ones[parts];
      for (auto& one : ones) one = V::set(1.0f);
      load_block<V>(x, block, values);
      alignas(64) std::uint8_t rounded[kBlock / kChunk * kChunkBytes];
      const bool whole = block.chunks == parts * kTile / kChunk;
      round_block<V>(values, ones, whole ? codes : rounded, scales[index], sums[index]);
      if (!whole) std::memcpy(codes, rounded, bytes);
    });
    codes += bytes;
  }
}

// Rows of activations times the scales of a group of outputs, and what zero points make of them.
template <typename V>
void scale_rows(const Weights& w, std::size_t group, const float* x, std::size_t rows,
                const ScaledRows& out) {
  const bool exact = out.spread != nullptr;
  const float middle = static_cast<float>(1 << (w.bits - 1));
  const std::size_t blocks = w.blocks.size(), row_bytes = w.padded / kChunk * kChunkBytes;
  // Memory brings the codes of the first tile meanwhile.
  constexpr std::size_t kLine = 64;
  const std::uint8_t* next = w.codes.data() + group * w.group_rows / kTile * w.tile_bytes;
  const std::size_t ahead = w.tile_bytes / blocks;
  Lines<V> lines(w, group);
  if (exact) std::fill_n(out.offsets, rows, 0.0f);
  for (std::size_t index = 0; index < blocks; ++index) {
    const Block& block = w.blocks[index];
    for (std::size_t at = 0; at < ahead; at += kLine) __builtin_prefetch(next + at, 0, 2);
    next += ahead;
    with_parts(block, [&](auto parts) {
      typename V::Float scale[parts], zero[parts], values[parts];
      for (int part = 0; part < parts; ++part) {
        lines.advance(scale[part], zero[part]);
        zero[part] = exact ? V::sub(zero[part], V::set(middle))
                           : V::mul(zero[part], V::set(1.0f / middle));
      }
      for (std::size_t row = 0; row < rows; ++row) {
        load_block<V>(x + row * w.columns, block, values);
        for (int part = 0; part < parts; ++part) values[part] = V::mul(values[part], scale[part]);
        if (!exact) {
          const std::size_t place = row * blocks + index;
          std::uint8_t* codes = out.codes + row * row_bytes + block.first / kChunk * kChunkBytes;
          round_block<V>(values, zero, codes, out.scales[place], out.sums[place]);
          continue;
        }
        typename V::Float offset = V::set(0.0f);
        float* spread = out.spread + row * w.padded + block.first;
        for (int part = 0; part < parts; ++part) {
          offset = V::fma(values[part], zero[part], offset);
          V::store(spread + part * static_cast<int>(kTile), values[part]);
        }
        out.offsets[row] += V::sum(offset);
      }
    });
  }
}

}  // namespace
}  // namespace quantine
