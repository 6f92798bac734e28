// Products with a tile, for any vector type `V` of 16 lanes; see planes.h.
#pragma once

#include "matrix/decode.h"
#include "matrix/level.h"
#include "matrix/outliers.h"
#include "matrix/round.h"

namespace quantine {
namespace {

// What the row is before its codes are met.
template <typename V>
inline typename V::Float first_sum(const Activations& a, int row) {
  return V::set(a.offsets == nullptr ? 0.0f : -a.offsets[row]);
}

// Sums of a block's codes times those of activations, less what the zero point makes of them.
template <typename V>
inline __attribute__((always_inline)) typename V::Float centred(const Activations& a,
                                                                std::size_t place,
                                                                typename V::Float zero,
                                                                typename V::Float sum) {
  return a.sums == nullptr ? sum : V::fnma(zero, V::set(a.sums[place]), sum);
}

template <typename V, int kBits, int kBatch>
void fast_tile(const Weights& w, const Activations& activations, std::size_t tile,
               typename V::Float* result) {
  const Activations a = activations;  // vectors may alias anything, but not a copy
  typename V::Float total[kBatch];
  for (int b = 0; b < kBatch; ++b) total[b] = first_sum<V>(a, b);
  Cursor<V> cursor(w, tile);
  typename V::Float scale, zero;
  typename V::Sum acc[kBatch];
  for (int b = 0; b < kBatch; ++b) acc[b] = V::no_sum();
  const std::uint8_t* x = a.codes;
  const std::size_t row_bytes = a.padded / kChunk * kChunkBytes;
  const Block* block = w.blocks.data();
  const Block* const blocks_end = block + w.blocks.size();
  std::size_t index = 0;
  cursor.advance(scale, zero);
  std::uint32_t left = block->chunks;
  each_chunk<V, kBits>(w, tile, [&](typename V::Int codes) __attribute__((always_inline)) {
    for (int b = 0; b < kBatch; ++b)
      acc[b] = V::dot(acc[b], codes, x + static_cast<std::size_t>(b) * row_bytes);
    x += kChunkBytes;
    if (--left != 0) return;
    for (int b = 0; b < kBatch; ++b) {
      const std::size_t place = static_cast<std::size_t>(b) * a.blocks + index;
      const auto sum = centred<V>(a, place, zero, V::to_float(V::whole(acc[b])));
      total[b] = V::fma(sum, V::mul(scale, V::set(a.scales[place])), total[b]);
      acc[b] = V::no_sum();
    }
    const std::uint32_t group = block->group;
    ++index;
    if (++block == blocks_end) {
      left = ~0u;  // what follows is padding
      return;
    }
    left = block->chunks;
    if (block->group != group) cursor.advance(scale, zero);
  });
  for (int b = 0; b < kBatch; ++b) result[b] = total[b];
}

constexpr std::size_t kManyRows = 64;  // of activations that share codes taken out once, at most

// The chunks of one block, taken out of their planes and ready for `V::dot`.
template <typename V>
struct TakenOut {
  typename V::Wide chunks[kBlock / kChunk];
  std::uint32_t count = 0;
};

// What a block adds to the sums of `kBatch` rows of activations, the first of which begins at `x`
// and at `place` among their scales.
template <typename V, int kBatch>
inline void add_block(const TakenOut<V>& block, const Activations& a, const std::uint8_t* x,
                      std::size_t place, typename V::Float scale, typename V::Float zero,
                      float (*totals)[kTile]) {
  const std::size_t row_bytes = a.padded / kChunk * kChunkBytes;
  typename V::Sum acc[kBatch];
  for (int b = 0; b < kBatch; ++b) acc[b] = V::no_sum();
  for (std::uint32_t c = 0; c < block.count; ++c, x += kChunkBytes) {
    const typename V::Wide codes = block.chunks[c];
    for (int b = 0; b < kBatch; ++b)
      acc[b] = V::dot(acc[b], codes, x + static_cast<std::size_t>(b) * row_bytes);
  }
  for (int b = 0; b < kBatch; ++b, place += a.blocks) {
    const auto sum = centred<V>(a, place, zero, V::to_float(V::whole(acc[b])));
    const auto factor = V::mul(scale, V::set(a.scales[place]));
    V::store(totals[b], V::fma(sum, factor, V::floats(totals[b])));
  }
}

// The same sums as those of `fast_tile`, of `batch` rows, kManyRows at most: sums move between
// registers and memory for each block, so that codes are taken out once for all rows.
template <typename V, int kBits>
void fast_rows(const Weights& w, const Activations& activations, std::size_t batch,
               std::size_t tile, float (*totals)[kTile]) {
  const Activations a = activations;
  const std::size_t row_bytes = a.padded / kChunk * kChunkBytes;
  for (std::size_t row = 0; row < batch; ++row)
    V::store(totals[row], first_sum<V>(a, static_cast<int>(row)));
  Cursor<V> cursor(w, tile);
  typename V::Float scale, zero;
  TakenOut<V> taken;
  const std::uint8_t* x = a.codes;
  const Block* block = w.blocks.data();
  const Block* const blocks_end = block + w.blocks.size();
  std::size_t index = 0;
  cursor.advance(scale, zero);
  each_chunk<V, kBits>(w, tile, [&](typename V::Int codes) __attribute__((always_inline)) {
    if (block == blocks_end) return;  // what follows is padding
    taken.chunks[taken.count++] = V::widen(codes);
    if (taken.count != block->chunks) return;
    std::size_t row = 0;
    const auto take = [&](auto rows) __attribute__((always_inline)) {
      for (; batch - row >= static_cast<std::size_t>(rows); row += rows)
        add_block<V, rows>(taken, a, x + row * row_bytes, row * a.blocks + index, scale, zero,
                           totals + row);
    };
    take(std::integral_constant<int, V::kBatch>{});
    take(std::integral_constant<int, 1>{});
    x += taken.count * kChunkBytes;
    taken.count = 0;
    ++index;
    const std::uint32_t group = block->group;
    if (++block != blocks_end && block->group != group) cursor.advance(scale, zero);
  });
}

// The same for one row of activations and blocks of `kChunks` each, without a look for the end of a
// block.
template <typename V, int kBits, int kChunks>
void even_tile(const Weights& w, const Activations& activations, std::size_t tile,
               typename V::Float* result) {
  using P = Planes<V, kBits>;
  constexpr int kUnit = std::max(P::kTogether, kChunks);
  const Activations a = activations;
  typename V::Float total = first_sum<V>(a, 0), scale = total, zero = total;
  Cursor<V> cursor(w, tile);
  const std::uint8_t* bytes = w.codes.data() + tile * w.tile_bytes;
  const std::uint8_t* x = a.codes;
  const std::size_t each = w.blocks_per_group;
  std::size_t left = 0;  // blocks of the group
  for (std::size_t index = 0; index < a.blocks; index += kUnit / kChunks) {
    typename V::Sum acc[2] = {V::no_sum(), V::no_sum()};  // they do not wait for each other
    unroll<kUnit / P::kTogether>([&](auto part) __attribute__((always_inline)) {
      const P planes(bytes + part * P::kVectors * 64);
      unroll<P::kTogether>([&](auto place) __attribute__((always_inline)) {
        constexpr int chunk = part * P::kTogether + place;
        acc[chunk % 2] = V::dot(acc[chunk % 2], planes.template codes<place>(),
                                x + chunk * static_cast<int>(kChunkBytes));
        if constexpr (chunk % kChunks == kChunks - 1) {
          const std::size_t block = index + chunk / kChunks;
          if (left-- == 0) {
            cursor.advance(scale, zero);
            left = each - 1;
          }
          const auto whole = V::to_float(V::plus(V::whole(acc[0]), V::whole(acc[1])));
          const auto sum = centred<V>(a, block, zero, whole);
          total = V::fma(sum, V::mul(scale, V::set(a.scales[block])), total);
          acc[0] = acc[1] = V::no_sum();
        }
      });
    });
    bytes += kUnit / P::kTogether * P::kVectors * 64;
    x += kUnit * static_cast<int>(kChunkBytes);
  }
  *result = total;
}

template <typename V, int kBits>
void fast_row(const Weights& w, const Activations& a, std::size_t tile, typename V::Float* result) {
  switch (w.even_chunks) {
    case 4:
      return even_tile<V, kBits, 4>(w, a, tile, result);
    case 8:
      return even_tile<V, kBits, 8>(w, a, tile, result);
    case 16:
      return even_tile<V, kBits, 16>(w, a, tile, result);
    default:
      return fast_tile<V, kBits, 1>(w, a, tile, result);
  }
}

template <typename V, int kBits, int kBatch>
void exact_tile(const Weights& w, const Activations& activations, std::size_t tile,
               typename V::Float* result) {
  constexpr int kChains = 2;  // sums that do not wait for each other
  const Activations a = activations;  // vectors may alias anything, but not a copy
  typename V::Float total[kBatch];
  for (int b = 0; b < kBatch; ++b) total[b] = first_sum<V>(a, b);
  Cursor<V> cursor(w, tile);
  typename V::Float scale, zero, acc[kBatch][kChains];
  for (int b = 0; b < kBatch; ++b)
    for (int c = 0; c < kChains; ++c) acc[b][c] = V::set(0.0f);
  const float* x = a.spread;
  const Block* block = w.blocks.data();
  const Block* const blocks_end = block + w.blocks.size();
  cursor.advance(scale, zero);
  std::uint32_t left = block->chunks;
  each_chunk<V, kBits>(w, tile, [&](typename V::Int codes) __attribute__((always_inline)) {
    if (block == blocks_end) return;
    unroll<4>([&](auto k) {
      const auto weight = V::sub(V::template byte<k>(codes), zero);
      for (int b = 0; b < kBatch; ++b)
        acc[b][k % kChains] = V::fma(
            weight, V::set(x[static_cast<std::size_t>(b) * a.padded + k]), acc[b][k % kChains]);
    });
    x += kChunk;
    if (--left != 0) return;
    for (int b = 0; b < kBatch; ++b) {
      total[b] = V::fma(V::add(acc[b][0], acc[b][1]), scale, total[b]);
      for (int c = 0; c < kChains; ++c) acc[b][c] = V::set(0.0f);
    }
    const std::uint32_t group = block->group;
    if (++block == blocks_end) return;
    left = block->chunks;
    if (block->group != group) cursor.advance(scale, zero);
  });
  for (int b = 0; b < kBatch; ++b) result[b] = total[b];
}

template <typename V, typename T, int kBatch>
void plain_tile(const Weights& w, const Activations& a, std::size_t tile,
                typename V::Float* total) {
  constexpr int kChains = 4;  // sums that do not wait for each other
  const T* values = reinterpret_cast<const T*>(w.codes.data() + tile * w.tile_bytes);
  typename V::Float acc[kBatch][kChains];
  for (int b = 0; b < kBatch; ++b)
    for (int c = 0; c < kChains; ++c) acc[b][c] = V::set(0.0f);
  const auto add = [&](std::size_t column, int chain) __attribute__((always_inline)) {
    const T* lanes = values + column * kTile;
    typename V::Float weight;
    if constexpr (sizeof(T) == 2) weight = V::halves(lanes);
    else weight = V::floats(lanes);
    for (int b = 0; b < kBatch; ++b)
      acc[b][chain] = V::fma(
          weight, V::set(a.x[static_cast<std::size_t>(b) * a.columns + column]), acc[b][chain]);
  };
  std::size_t column = 0;
  for (; column + kChains <= w.columns; column += kChains)
    unroll<kChains>([&](auto c) { add(column + c, c); });
  for (; column < w.columns; ++column) add(column, 0);
  for (int b = 0; b < kBatch; ++b)
    total[b] = V::add(V::add(acc[b][0], acc[b][1]), V::add(acc[b][2], acc[b][3]));
}

template <typename V, int kBatch>
void sum_tile(const Weights& w, const Activations& a, std::size_t tile, typename V::Float* total,
              bool exact) {
  if (w.bits == 16) return plain_tile<V, std::uint16_t, kBatch>(w, a, tile, total);
  if (w.bits == 32) return plain_tile<V, float, kBatch>(w, a, tile, total);
  with_bits(w.bits, [&](auto bits) {
    if (exact) exact_tile<V, bits, kBatch>(w, a, tile, total);
    else if constexpr (kBatch == 1) fast_row<V, bits>(w, a, tile, total);
    else fast_tile<V, bits, kBatch>(w, a, tile, total);
  });
}

// Asks memory for what a tile takes besides its codes: short pieces of several arrays, which
// processors do not foresee.
inline void fetch(const Weights& w, std::size_t tile) {
  constexpr std::size_t kLine = 64;
  const auto ask = [](const void* from, std::size_t bytes) {
    for (std::size_t at = 0; at < bytes; at += kLine)
      __builtin_prefetch(static_cast<const std::uint8_t*>(from) + at);
  };
  if ((tile + 1) * kTile > w.rows) return;
  const std::size_t statistics = w.group_rows == 0 ? w.groups * w.group_bytes : 0;
  ask(w.statistics.data() + tile * statistics, std::min(statistics, 4 * kLine));
  if (w.outlier_offsets.empty()) return;
  const std::size_t first = w.outlier_offsets[tile];
  const std::size_t count = std::min<std::size_t>(w.outlier_offsets[tile + 1] - first, 128);
  if (count == 0) return;
  ask(&w.outlier_lanes[first], count);
  if (!w.outlier_short_columns.empty())
    ask(&w.outlier_short_columns[first], count * sizeof(std::uint16_t));
  if (!w.outlier_halves.empty()) ask(&w.outlier_halves[first], count * sizeof(std::uint16_t));
  else ask(&w.outlier_floats[first], count * sizeof(float));
}

// Rows `tile * 16` and following of a row of `y`, from the first lane of `a` on.
inline void write_lanes(const Weights& w, const Activations& a, std::size_t tile,
                        const float* lanes, float* y) {
  const std::size_t first = tile * kTile, count = std::min(kTile, w.rows - first);
  std::memcpy(y + first + a.first_lane, lanes + a.first_lane,
              (count - a.first_lane) * sizeof(float));
}

template <typename V, int kBatch>
void tile_of(const Weights& w, const Activations& a, std::size_t tile, float* y, bool exact) {
  typename V::Float total[kBatch];
  for (int b = 0; b < kBatch; ++b) total[b] = V::set(0.0f);
  sum_tile<V, kBatch>(w, a, tile, total, exact);
  for (int b = 0; b < kBatch; ++b) {
    float lane[kTile];
    V::store(lane, total[b]);
    if (kBatch == 1 && a.turned == nullptr && !w.outlier_offsets.empty())
      add_outliers<V>(w, tile, a.x, lane);
    write_lanes(w, a, tile, lane, y + static_cast<std::size_t>(b) * w.rows);
  }
}

template <typename V>
void many_of(const Weights& w, const Activations& a, std::size_t batch, std::size_t tile,
             float* y) {
  alignas(64) float totals[kManyRows][kTile];
  with_bits(w.bits, [&](auto bits) { fast_rows<V, bits>(w, a, batch, tile, totals); });
  for (std::size_t row = 0; row < batch; ++row)
    write_lanes(w, a, tile, totals[row], y + row * w.rows);
}

inline Activations from_row(const Activations& a, std::size_t row) {
  Activations rest = a;
  rest.x += row * a.columns;
  if (a.spread != nullptr) rest.spread += row * a.padded;
  if (a.codes != nullptr) rest.codes += row * (a.padded / kChunk * kChunkBytes);
  if (a.scales != nullptr) rest.scales += row * a.blocks;
  if (a.sums != nullptr) rest.sums += row * a.blocks;
  if (a.offsets != nullptr) rest.offsets += row;
  return rest;
}

template <typename V>
void multiply_tile(const Weights& w, const Activations& a, std::size_t batch, std::size_t tile,
                   float* y, bool exact) {
  fetch(w, tile + 1);
  std::size_t row = 0;
  if constexpr (V::kMany > 0)
    while (!exact && w.bits <= 8 && batch - row >= V::kMany) {
      const std::size_t some = std::min(kManyRows, batch - row);
      many_of<V>(w, from_row(a, row), some, tile, y + row * w.rows);
      row += some;
    }
  const auto take = [&](auto rows) {
    while (batch - row >= static_cast<std::size_t>(rows)) {
      tile_of<V, rows>(w, from_row(a, row), tile, y + row * w.rows, exact);
      row += rows;
    }
  };
  if constexpr (V::kBatch > 1) {
    take(std::integral_constant<int, V::kBatch>{});
    take(std::integral_constant<int, V::kBatch / 2>{});
    if constexpr (V::kBatch > 4) take(std::integral_constant<int, V::kBatch / 4>{});
  }
  take(std::integral_constant<int, 1>{});
  if (a.turned != nullptr && !w.outlier_offsets.empty()) add_outliers<V>(w, a, batch, tile, y);
}

template <typename V>
Level level_of(const char* name) {
  return {name,          multiply_tile<V>,      round_row<V>,
          scale_rows<V>, decode_tile<V, float>, decode_tile<V, std::uint16_t>,
          unpack_tile<V>};
}

}  // namespace
}  // namespace quantine
