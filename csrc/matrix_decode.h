// Tiles as floats, for any vector type `V` of 16 lanes; see matrix_planes.h.
#pragma once

#include "half.h"
#include "matrix_planes.h"

namespace quantine {
namespace {

template <typename V, int kBits, typename Store>
inline void decode_codes(const Weights& w, std::size_t tile, Store&& store) {
  Cursor<V> cursor(w, tile);
  typename V::Float scale, zero;
  const Block* block = w.blocks.data();
  const Block* const blocks_end = block + w.blocks.size();
  cursor.advance(scale, zero);
  std::uint32_t chunk = 0;
  each_chunk<V, kBits>(w, tile, [&](typename V::Int codes) __attribute__((always_inline)) {
    if (block == blocks_end) return;
    unroll<4>([&](auto k) {
      const std::uint32_t place = chunk * static_cast<std::uint32_t>(kChunk) + k;
      if (place < block->width)
        store(block->first + place, V::mul(V::sub(V::template byte<k>(codes), zero), scale));
    });
    if (++chunk != block->chunks) return;
    chunk = 0;
    const std::uint32_t group = block->group;
    if (++block == blocks_end) return;
    if (block->group != group) cursor.advance(scale, zero);
  });
}

// A tile transposed: element `[column * stride + lane]`.
template <typename V, typename T>
void decode_tile(const Weights& w, std::size_t tile, T* out, std::size_t stride) {
  const auto place = [&](std::size_t column) { return w.order.empty() ? column : w.order[column]; };
  const auto store = [&](std::size_t column, typename V::Float value) __attribute__((always_inline)) {
    T* target = out + place(column) * stride;
    if constexpr (sizeof(T) == 4) V::store(target, value);
    else V::store_bfloat16(target, value);
  };
  if (w.bits <= 8) {
    with_bits(w.bits, [&](auto bits) { decode_codes<V, bits>(w, tile, store); });
  } else {
    const std::size_t item = static_cast<std::size_t>(w.bits) / 8;
    const std::uint8_t* bytes = w.codes.data() + tile * w.tile_bytes;
    for (std::size_t column = 0; column < w.columns; ++column, bytes += kTile * item)
      store(column, item == 2 ? V::halves(bytes) : V::floats(bytes));
  }
  if (w.outlier_offsets.empty()) return;
  const std::size_t first = tile * kTile, lanes = std::min(kTile, w.rows - first);
  for (std::size_t lane = 0; lane < lanes; ++lane)
    for (std::size_t e = w.outlier_offsets[first + lane]; e < w.outlier_offsets[first + lane + 1]; ++e) {
      const std::size_t column =
          w.outlier_short_columns.empty() ? w.outlier_columns[e] : w.outlier_short_columns[e];
      T& target = out[place(column) * stride + lane];
      if constexpr (sizeof(T) == 4) {
        target = w.outlier_halves.empty() ? target + w.outlier_floats[e]
                                          : half_to_float(w.outlier_halves[e]);
      } else {
        const std::uint32_t bits = static_cast<std::uint32_t>(target) << 16;
        float held;
        std::memcpy(&held, &bits, sizeof held);
        target = float_to_bfloat16(w.outlier_halves.empty() ? held + w.outlier_floats[e]
                                                            : half_to_float(w.outlier_halves[e]));
      }
    }
}

}  // namespace
}  // namespace quantine
