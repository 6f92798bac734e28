// The loops over a tile of 16 rows, for any vector type `V` of 16 lanes. Included by one file for
// each instruction set, inside an unnamed namespace: nothing here may be shared between them.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "matrix_level.h"

namespace quantine {
namespace {

template <int N, typename F>
inline __attribute__((always_inline)) void unroll(F&& f) {
  if constexpr (N > 0) {
    unroll<N - 1>(f);
    f(std::integral_constant<int, N - 1>{});
  }
}

constexpr int together_of(int bits) { return bits == 8 ? 1 : bits % 2 ? 8 : bits % 4 ? 4 : 2; }

// Vectors that hold the codes of some chunks, in planes of 8, 4, 2 and 1 bits.
template <typename V, int kBits>
struct Planes {
  static constexpr int kTogether = together_of(kBits);
  static constexpr int kVectors = kBits * kTogether / 8;

  inline __attribute__((always_inline)) explicit Planes(const std::uint8_t* bytes) {
    unroll<kVectors>([&](auto v) { held[v] = V::load(bytes + 64 * v); });
  }

  // Codes of chunk `place`: four bytes in each of 16 lanes.
  template <int place>
  inline __attribute__((always_inline)) typename V::Int codes() const {
    if constexpr (kBits == 8) {
      return held[0];
    } else {
      constexpr int kFour = kBits & 4 ? kTogether / 2 : 0, kTwo = kBits & 2 ? kTogether / 4 : 0;
      typename V::Int found = V::nothing();
      if constexpr ((kBits & 4) != 0)
        found = V::template field<4 * (place % 2), 0x0f0f0f0fu>(held[place / 2]);
      if constexpr ((kBits & 2) != 0) {
        constexpr int low = kBits & 4;
        const auto two = V::template field<2 * (place % 4) - low, 0x03030303u << low>(
            held[kFour + place / 4]);
        found = low ? V::join(found, two) : two;
      }
      if constexpr ((kBits & 1) != 0) {
        constexpr int low = kBits & 6;
        const auto one =
            V::template field<place - low, 0x01010101u << low>(held[kFour + kTwo]);
        found = V::join(found, one);
      }
      return found;
    }
  }

  typename V::Int held[kVectors];
};

// The statistics of the groups of a tile, one group after another.
template <typename V>
class Cursor {
 public:
  using Float = typename V::Float;

  inline Cursor(const Weights& w, std::size_t tile)
      : next_(w.statistics.data() + tile * w.groups * w.group_bytes),
        step_(w.group_bytes),
        scale_(w.scale, tile, w.groups),
        zero_(w.zero, tile, w.groups),
        middle_(static_cast<float>(1 << (w.bits - 1))) {}

  inline __attribute__((always_inline)) void advance(Float& scale, Float& zero) {
    scale = read(scale_, next_);
    zero = zero_.kept == Kept::kMiddle ? V::set(middle_) : read(zero_, next_ + zero_.offset);
    next_ += step_;
  }

 private:
  // A copy of what is read for every group: the compiler can keep it in registers.
  struct Reader {
    inline Reader(const StatisticLayout& s, std::size_t tile, std::size_t groups)
        : kept(s.kept), offset(s.offset), second(nullptr), spreader(V::spreader(s.bits)) {
      if (kept == Kept::kCoded) second = s.second.data() + tile * kTile / s.span * groups * 2;
    }
    Kept kept;
    std::size_t offset;
    const float* second;
    typename V::Spreader spreader;
  };

  static inline __attribute__((always_inline)) Float read(Reader& s, const std::uint8_t* bytes) {
    if (s.kept == Kept::kHalf) return V::halves(bytes);
    if (s.kept == Kept::kFloat) return V::floats(bytes);
    const Float code = V::spread(bytes, s.spreader);
    if (s.kept == Kept::kWhole) return code;
    const Float step = V::set(s.second[0]), zero = V::set(s.second[1]);
    s.second += 2;
    return V::mul(V::sub(code, zero), step);
  }

  const std::uint8_t* next_;
  std::size_t step_;
  Reader scale_, zero_;
  float middle_;
};

inline std::int32_t four_codes(const std::int8_t* codes) {
  std::int32_t word;
  std::memcpy(&word, codes, sizeof word);
  return word;
}

// Calls `chunk(codes)` for every chunk of a tile in order.
template <typename V, int kBits, typename F>
inline __attribute__((always_inline)) void each_chunk(const Weights& w, std::size_t tile, F&& chunk) {
  const std::uint8_t* bytes = w.codes.data() + tile * w.tile_bytes;
  const std::uint8_t* end = bytes + w.tile_bytes;
  using P = Planes<V, kBits>;
  for (; bytes != end; bytes += P::kVectors * 64) {
    const P planes(bytes);
    // Unrolled, what follows would be copied for every place: code grows faster than speed.
    typename V::Int codes[P::kTogether];
    unroll<P::kTogether>([&](auto place) { codes[place] = planes.template codes<place>(); });
    for (int place = 0; place < P::kTogether; ++place) chunk(codes[place]);
  }
}

template <typename V, int kBits, int kBatch>
void fast_tile(const Weights& w, const Activations& activations, std::size_t tile,
               typename V::Float* result) {
  const Activations a = activations;  // vectors may alias anything, but not a copy
  typename V::Float total[kBatch];
  for (int b = 0; b < kBatch; ++b) total[b] = V::set(0.0f);
  Cursor<V> cursor(w, tile);
  typename V::Float scale, zero;
  typename V::Int acc[kBatch];
  for (int b = 0; b < kBatch; ++b) acc[b] = V::nothing();
  const std::int8_t* x = a.codes;
  const Block* block = w.blocks.data();
  const Block* const blocks_end = block + w.blocks.size();
  std::size_t index = 0;
  cursor.advance(scale, zero);
  std::uint32_t left = block->chunks;
  each_chunk<V, kBits>(w, tile, [&](typename V::Int codes) __attribute__((always_inline)) {
    for (int b = 0; b < kBatch; ++b)
      acc[b] = V::dot(acc[b], codes, four_codes(x + static_cast<std::size_t>(b) * a.padded));
    x += kChunk;
    if (--left != 0) return;
    for (int b = 0; b < kBatch; ++b) {
      const std::size_t place = static_cast<std::size_t>(b) * a.blocks + index;
      const auto centred = V::fnma(zero, V::set(a.sums[place]), V::to_float(acc[b]));
      total[b] = V::fma(centred, V::mul(scale, V::set(a.scales[place])), total[b]);
      acc[b] = V::nothing();
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

// The same for one row of activations and blocks of `kChunks` each: without a look for the end of a
// block, and with two sums that do not wait for each other.
template <typename V, int kBits, int kChunks>
void even_tile(const Weights& w, const Activations& activations, std::size_t tile,
               typename V::Float* result) {
  using P = Planes<V, kBits>;
  constexpr int kUnit = std::max(P::kTogether, kChunks);
  const Activations a = activations;
  typename V::Float total = V::set(0.0f), scale = total, zero = total;
  Cursor<V> cursor(w, tile);
  const std::uint8_t* bytes = w.codes.data() + tile * w.tile_bytes;
  const std::int8_t* x = a.codes;
  const std::size_t each = w.blocks_per_group;
  std::size_t left = 0;  // blocks of the group
  for (std::size_t index = 0; index < a.blocks; index += kUnit / kChunks) {
    typename V::Int sums[2] = {V::nothing(), V::nothing()};
    unroll<kUnit / P::kTogether>([&](auto part) __attribute__((always_inline)) {
      const P planes(bytes + part * P::kVectors * 64);
      unroll<P::kTogether>([&](auto place) __attribute__((always_inline)) {
        constexpr int chunk = part * P::kTogether + place;
        sums[chunk % 2] = V::dot(sums[chunk % 2], planes.template codes<place>(),
                                 four_codes(x + chunk * static_cast<int>(kChunk)));
        if constexpr (chunk % kChunks == kChunks - 1) {
          const std::size_t block = index + chunk / kChunks;
          if (left-- == 0) {
            cursor.advance(scale, zero);
            left = each - 1;
          }
          const auto sum = V::to_float(V::sum(sums[0], sums[1]));
          const auto centred = V::fnma(zero, V::set(a.sums[block]), sum);
          total = V::fma(centred, V::mul(scale, V::set(a.scales[block])), total);
          sums[0] = sums[1] = V::nothing();
        }
      });
    });
    bytes += kUnit / P::kTogether * P::kVectors * 64;
    x += kUnit * static_cast<int>(kChunk);
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
  const Activations a = activations;  // vectors may alias anything, but not a copy
  typename V::Float total[kBatch];
  for (int b = 0; b < kBatch; ++b) total[b] = V::set(0.0f);
  Cursor<V> cursor(w, tile);
  typename V::Float scale, zero, acc[kBatch];
  for (int b = 0; b < kBatch; ++b) acc[b] = V::set(0.0f);
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
        acc[b] = V::fma(weight, V::set(x[static_cast<std::size_t>(b) * a.padded + k]), acc[b]);
    });
    x += kChunk;
    if (--left != 0) return;
    for (int b = 0; b < kBatch; ++b) {
      total[b] = V::fma(acc[b], scale, total[b]);
      acc[b] = V::set(0.0f);
    }
    const std::uint32_t group = block->group;
    if (++block == blocks_end) return;
    left = block->chunks;
    if (block->group != group) cursor.advance(scale, zero);
  });
  for (int b = 0; b < kBatch; ++b) result[b] = total[b];
}

template <typename V, typename T, int kBatch>
void plain_tile(const Weights& w, const Activations& a, std::size_t tile, typename V::Float* total) {
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
      acc[b][chain] =
          V::fma(weight, V::set(a.x[static_cast<std::size_t>(b) * a.columns + column]), acc[b][chain]);
  };
  std::size_t column = 0;
  for (; column + kChains <= w.columns; column += kChains)
    unroll<kChains>([&](auto c) { add(column + c, c); });
  for (; column < w.columns; ++column) add(column, 0);
  for (int b = 0; b < kBatch; ++b)
    total[b] = V::add(V::add(acc[b][0], acc[b][1]), V::add(acc[b][2], acc[b][3]));
}

// What outliers of `row` add for one row of activations.
template <typename V>
float outliers(const Weights& w, std::size_t row, const float* x) {
  const std::size_t first = w.outlier_offsets[row], count = w.outlier_offsets[row + 1] - first;
  const std::uint16_t* halves = w.outlier_halves.empty() ? nullptr : &w.outlier_halves[first];
  const float* floats = w.outlier_floats.empty() ? nullptr : &w.outlier_floats[first];
  if (!w.outlier_short_columns.empty())
    return V::sparse(&w.outlier_short_columns[first], halves, floats, count, x);
  float sum = 0.0f;
  for (std::size_t e = 0; e < count; ++e)
    sum += x[w.outlier_columns[first + e]] * (halves ? half_to_float(halves[e]) : floats[e]);
  return sum;
}

template <typename V, int kBatch>
void packed_tile(const Weights& w, const Activations& a, std::size_t tile,
                 typename V::Float* total, bool exact) {
  switch (w.bits) {
#define QUANTINE_BITS(n)                                                  \
  case n:                                                                 \
    if (exact) return exact_tile<V, n, kBatch>(w, a, tile, total);        \
    if constexpr (kBatch == 1) return fast_row<V, n>(w, a, tile, total);  \
    return fast_tile<V, n, kBatch>(w, a, tile, total);
    QUANTINE_BITS(2)
    QUANTINE_BITS(3)
    QUANTINE_BITS(4)
    QUANTINE_BITS(5)
    QUANTINE_BITS(6)
    QUANTINE_BITS(7)
    QUANTINE_BITS(8)
#undef QUANTINE_BITS
    case 16:
      return plain_tile<V, std::uint16_t, kBatch>(w, a, tile, total);
    default:
      return plain_tile<V, float, kBatch>(w, a, tile, total);
  }
}

template <typename V, int kBatch>
void tile_of(const Weights& w, const Activations& a, std::size_t tile, float* y, bool exact) {
  typename V::Float total[kBatch];
  for (int b = 0; b < kBatch; ++b) total[b] = V::set(0.0f);
  packed_tile<V, kBatch>(w, a, tile, total, exact);
  const std::size_t first = tile * kTile, lanes = std::min(kTile, w.rows - first);
  for (int b = 0; b < kBatch; ++b) {
    float lane[kTile];
    V::store(lane, total[b]);
    if (!w.outlier_offsets.empty())
      for (std::size_t r = 0; r < lanes; ++r)
        lane[r] += outliers<V>(w, first + r, a.x + static_cast<std::size_t>(b) * a.columns);
    std::memcpy(y + static_cast<std::size_t>(b) * w.rows + first, lane, lanes * sizeof(float));
  }
}

inline Activations from_row(const Activations& a, std::size_t row) {
  Activations rest = a;
  rest.x += row * a.columns;
  if (a.spread != nullptr) rest.spread += row * a.padded;
  if (a.codes != nullptr) rest.codes += row * a.padded;
  if (a.scales != nullptr) rest.scales += row * a.blocks;
  if (a.sums != nullptr) rest.sums += row * a.blocks;
  return rest;
}

template <typename V>
void multiply_tile(const Weights& w, const Activations& a, std::size_t batch, std::size_t tile,
                   float* y, bool exact) {
  std::size_t row = 0;
  const auto take = [&](auto rows) {
    while (batch - row >= static_cast<std::size_t>(rows)) {
      tile_of<V, rows>(w, from_row(a, row), tile, y + row * w.rows, exact);
      row += rows;
    }
  };
  if constexpr (V::kBatch > 1) {
    take(std::integral_constant<int, V::kBatch>{});
    take(std::integral_constant<int, V::kBatch / 2>{});
  }
  take(std::integral_constant<int, 1>{});
}

// Activations of a row in 8 bit: codes, scale and sum of codes of every block.
template <typename V>
void round_row(const Weights& w, const float* x, std::int8_t* codes, float* scales, float* sums) {
  for (std::size_t index = 0; index < w.blocks.size(); ++index) {
    const Block& block = w.blocks[index];
    const std::size_t parts = (block.width + kTile - 1) / kTile;
    alignas(64) float values[kBlock];
    for (std::size_t part = 0; part < parts; ++part) V::store(values + part * kTile, V::set(0.0f));
    std::memcpy(values, x + block.first, block.width * sizeof(float));
    typename V::Float widest = V::set(0.0f);
    for (std::size_t part = 0; part < parts; ++part)
      widest = V::larger(widest, V::magnitude(V::floats(values + part * kTile)));
    const float largest = V::largest(widest);  // NaN where one is
    // Below this the reciprocal of the scale overflows; what is lost is below 1e-35.
    const bool small = largest <= 1e-35f;
    const bool finite = largest <= 3.4028235e38f;
    const auto inverse = V::set(small || !finite ? 0.0f : 127.0f / largest);
    alignas(64) std::int8_t rounded[kBlock];
    std::int32_t sum = 0;
    for (std::size_t part = 0; part < parts; ++part)
      sum += V::round(rounded + part * kTile, V::mul(V::floats(values + part * kTile), inverse));
    std::memcpy(codes, rounded, block.chunks * kChunk);
    codes += block.chunks * kChunk;
    scales[index] = finite ? (small ? 0.0f : largest / 127.0f) : NAN;
    sums[index] = static_cast<float>(sum);
  }
}

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
  switch (w.bits) {
#define QUANTINE_BITS(n)                \
  case n:                               \
    decode_codes<V, n>(w, tile, store); \
    break;
    QUANTINE_BITS(2)
    QUANTINE_BITS(3)
    QUANTINE_BITS(4)
    QUANTINE_BITS(5)
    QUANTINE_BITS(6)
    QUANTINE_BITS(7)
    QUANTINE_BITS(8)
#undef QUANTINE_BITS
    default: {
      const std::size_t item = static_cast<std::size_t>(w.bits) / 8;
      const std::uint8_t* bytes = w.codes.data() + tile * w.tile_bytes;
      for (std::size_t column = 0; column < w.columns; ++column, bytes += kTile * item)
        store(column, item == 2 ? V::halves(bytes) : V::floats(bytes));
    }
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

template <typename V>
Level level_of(const char* name) {
  return {name, multiply_tile<V>, round_row<V>, decode_tile<V, float>, decode_tile<V, std::uint16_t>};
}

}  // namespace
}  // namespace quantine
