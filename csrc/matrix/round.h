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

// A block of activations in 16 bit: stores its codes, which the values become, and returns their
// scale.
template <typename V, int kParts>
inline __attribute__((always_inline)) float round_block(typename V::Float (&values)[kParts],
                                                        std::uint8_t* codes) {
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
  for (int part = 0; part < kParts; ++part) values[part] = V::mul(values[part], inverse);
  V::template round<kParts>(codes, values);
  return finite ? (small ? 0.0f : largest / kTop) : NAN;
}

// Activations of a row in 16 bit: codes, scale and sum of codes of every block.
template <typename V>
void round_row(const Weights& w, const float* x, std::uint8_t* codes, float* scales, float* sums) {
  for (std::size_t index = 0; index < w.blocks.size(); ++index) {
    const Block& block = w.blocks[index];
    const std::size_t bytes = block.chunks * kChunkBytes;
    with_parts(block, [&](auto parts) {
      typename V::Float values[parts];
      load_block<V>(x, block, values);
      alignas(64) std::uint8_t rounded[kBlock / kChunk * kChunkBytes];
      const bool whole = block.chunks == parts * kTile / kChunk;
      scales[index] = round_block<V>(values, whole ? codes : rounded);
      for (int part = 1; part < parts; ++part) values[0] = V::add(values[0], values[part]);
      sums[index] = V::sum(values[0]);
      if (!whole) std::memcpy(codes, rounded, bytes);
    });
    codes += bytes;
  }
}

// Rows of activations, 16 at most, times the scales of a group of outputs, and what zero points
// make of them.
template <typename V, bool kExact>
void scale_by_group(const Weights& w, std::size_t group, const float* x, std::size_t rows,
                    const ScaledRows& out) {
  using Float = typename V::Float;
  const std::size_t blocks = w.blocks.size(), row_bytes = w.padded / kChunk * kChunkBytes;
  // Memory brings codes of the first tile meanwhile: as many as keep it as busy as products do.
  constexpr std::size_t kLine = 64;
  const std::uint8_t* next = w.codes.data() + group * w.group_rows / kTile * w.tile_bytes;
  const std::size_t tiles = (w.group_rows + kTile - 1) / kTile;
  const std::size_t ahead = w.tile_bytes * tiles / (tiles + 1) / blocks;
  Lines<V> lines(w, group);
  Float offsets[kTile];
  for (std::size_t row = 0; row < rows; ++row) offsets[row] = V::set(0.0f);
  for (std::size_t index = 0; index < blocks; ++index) {
    const Block block = w.blocks[index];
    for (std::size_t at = 0; at < ahead; at += kLine) __builtin_prefetch(next + at, 0, 2);
    next += ahead;
    with_parts(block, [&](auto parts) __attribute__((always_inline)) {
      Float scale[parts], zero[parts], values[parts];
      lines.template advance<parts>(scale, zero);
      if constexpr (kExact) {  // kernels take the middle code off each code
        const Float middle = V::set(static_cast<float>(1 << (w.bits - 1)));
        for (Float& one : zero) one = V::sub(one, middle);
      }
      for (std::size_t row = 0; row < rows; ++row) {
        load_block<V>(x + row * w.columns, block, values);
        for (int part = 0; part < parts; ++part) values[part] = V::mul(values[part], scale[part]);
        if constexpr (kExact) {
          float* spread = out.spread + row * w.padded + block.first;
          for (int part = 0; part < parts; ++part) {
            offsets[row] = V::fma(values[part], zero[part], offsets[row]);
            V::store(spread + part * static_cast<int>(kTile), values[part]);
          }
        } else {
          std::uint8_t* codes = out.codes + row * row_bytes + block.first / kChunk * kChunkBytes;
          const float step = round_block<V>(values, codes);
          Float sum = V::set(0.0f);
          for (int part = 0; part < parts; ++part) sum = V::fma(values[part], zero[part], sum);
          out.scales[row * blocks + index] = step;
          offsets[row] = V::fma(sum, V::set(step), offsets[row]);
        }
      }
    });
  }
  for (std::size_t row = 0; row < rows; ++row) out.offsets[row] = V::sum(offsets[row]);
}

template <typename V>
void scale_rows(const Weights& w, std::size_t group, const float* x, std::size_t rows,
                const ScaledRows& out) {
  const auto scale = out.spread != nullptr ? scale_by_group<V, true> : scale_by_group<V, false>;
  scale(w, group, x, rows, out);
}

}  // namespace
}  // namespace quantine
