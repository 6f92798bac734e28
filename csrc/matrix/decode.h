// Tiles as floats or plain bytes, for any vector type `V` of 16 lanes; see planes.h.
#pragma once

#include "base/half.h"
#include "matrix/planes.h"

namespace quantine {
namespace {

constexpr std::size_t kStrip = 32;  // columns that are turned into rows at once

// Columns of a tile that wait to be rows: `[kStrip, 16]`.
struct Strip {
  alignas(64) float columns[kStrip][kTile];
};

inline void convert(float value, float* out) { *out = value; }
inline void convert(float value, std::uint16_t* out) { *out = float_to_bfloat16(value); }

// Row `lane` of the first `count` columns goes to `out + lane * stride`.
template <typename T>
inline void turn_slowly(const Strip& strip, std::size_t count, T* out, std::size_t stride) {
  for (std::size_t lane = 0; lane < kTile; ++lane)
    for (std::size_t c = 0; c < count; ++c)
      convert(strip.columns[c][lane], out + lane * stride + c);
}

// The codes of a tile, one byte each, chunk by chunk, with room for whole vectors of chunks; and
// its statistics `[groups, 16]`. Groups run along inputs.
template <typename V>
void unpack_tile(const Weights& w, std::size_t tile, std::uint8_t* codes, float* scales,
                 float* zeros) {
  static_assert(sizeof(typename V::Int) == kTile * kChunk);
  with_bits(w.bits, [&](auto bits) {
    each_chunk<V, bits>(w, tile, [&](typename V::Int chunk) __attribute__((always_inline)) {
      std::memcpy(codes, &chunk, sizeof chunk);
      codes += sizeof chunk;
    });
  });
  Cursor<V> cursor(w, tile);
  typename V::Float scale, zero;
  for (std::size_t group = 0; group < w.groups; ++group) {
    cursor.advance(scale, zero);
    V::store(scales + group * kTile, scale);
    V::store(zeros + group * kTile, zero);
  }
}

// Calls `store(value)` for every stored column in order.
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
        store(V::mul(V::sub(V::template byte<k>(codes), zero), scale));
    });
    if (++chunk != block->chunks) return;
    chunk = 0;
    const std::uint32_t group = block->group;
    if (++block == blocks_end) return;
    if (block->group != group) cursor.advance(scale, zero);
  });
}

// The same where groups run along outputs, and each column has a scale and a zero point.
template <typename V, int kBits, typename Store>
inline void decode_columns(const Weights& w, std::size_t tile, std::size_t group, Store&& store) {
  Lines<V> lines(w, group);
  float scales[kTile], zeros[kTile];
  std::size_t column = 0;
  each_chunk<V, kBits>(w, tile, [&](typename V::Int codes) __attribute__((always_inline)) {
    if (column >= w.columns) return;  // what follows is padding
    if (column % kTile == 0) {
      typename V::Float scale[1], zero[1];
      lines.template advance<1>(scale, zero);
      V::store(scales, scale[0]);
      V::store(zeros, zero[0]);
    }
    unroll<4>([&](auto k) {
      const std::size_t lane = column % kTile + k;
      if (column + k < w.columns)
        store(V::mul(V::sub(V::template byte<k>(codes), V::set(zeros[lane])),
                     V::set(scales[lane])));
    });
    column += kChunk;
  });
}

template <typename T>
void decode_outliers(const Weights& w, std::size_t tile, T* out, std::size_t stride) {
  for (std::size_t e = w.outlier_offsets[tile]; e < w.outlier_offsets[tile + 1]; ++e) {
    const std::size_t column =
        w.outlier_short_columns.empty() ? w.outlier_columns[e] : w.outlier_short_columns[e];
    T& target = out[w.outlier_lanes[e] * stride + column];
    if (!w.outlier_halves.empty()) {
      convert(half_to_float(w.outlier_halves[e]), &target);
    } else if constexpr (sizeof(T) == 4) {
      target += w.outlier_floats[e];
    } else {
      const std::uint32_t bits = static_cast<std::uint32_t>(target) << 16;
      float held;
      std::memcpy(&held, &bits, sizeof held);
      convert(held + w.outlier_floats[e], &target);
    }
  }
}

// The 16 rows of a tile in stored order, those beyond the last row included: row `lane` is at
// `out + lane * stride`. All have the scales of `group`, where groups run along outputs.
template <typename V, typename T>
void decode_tile(const Weights& w, std::size_t tile, std::size_t group, T* out,
                 std::size_t stride) {
  Strip strip;
  std::size_t waiting = 0;
  T* next = out;
  const auto store = [&](typename V::Float value) __attribute__((always_inline)) {
    V::store(strip.columns[waiting], value);
    if (++waiting != kStrip) return;
    V::turn(strip, kStrip, next, stride);
    next += kStrip;
    waiting = 0;
  };
  if (w.bits <= 8) {
    with_bits(w.bits, [&](auto bits) {
      if (w.group_rows == 0) decode_codes<V, bits>(w, tile, store);
      else decode_columns<V, bits>(w, tile, group, store);
    });
  } else {
    const std::size_t item = static_cast<std::size_t>(w.bits) / 8;
    const std::uint8_t* bytes = w.codes.data() + tile * w.tile_bytes;
    for (std::size_t column = 0; column < w.columns; ++column, bytes += kTile * item)
      store(item == 2 ? V::halves(bytes) : V::floats(bytes));
  }
  V::turn(strip, waiting, next, stride);
  if (!w.outlier_offsets.empty()) decode_outliers(w, tile, out, stride);
}

}  // namespace
}  // namespace quantine
