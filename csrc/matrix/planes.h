// How the bytes of a tile of 16 rows come apart, for any vector type `V` of 16 lanes: its codes,
// plane by plane, and its statistics. Like what includes it, part of one file for each instruction
// set: nothing here may be shared between them.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "matrix/matrix.h"

namespace quantine {
namespace {

template <int N, typename F>
inline __attribute__((always_inline)) void unroll(F&& f) {
  if constexpr (N > 0) {
    unroll<N - 1>(f);
    f(std::integral_constant<int, N - 1>{});
  }
}

constexpr std::size_t kAhead = 4096;  // bytes that memory is asked for before they are needed

// Vectors that hold the codes of some chunks, in planes of 8, 4, 2 and 1 bits.
template <typename V, int kBits>
struct Planes {
  static constexpr int kTogether = chunks_together(kBits);
  static constexpr int kVectors = kBits * kTogether / 8;

  inline __attribute__((always_inline)) explicit Planes(const std::uint8_t* bytes) {
    unroll<kVectors>([&](auto v) {
      held[v] = V::load(bytes + 64 * v);
      __builtin_prefetch(bytes + 64 * v + kAhead, 0, 2);
    });
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

// Of float16.
constexpr std::uint16_t kOnes[kTile] = {0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00,
                                        0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00, 0x3c00,
                                        0x3c00, 0x3c00, 0x3c00, 0x3c00};

// A copy of how a statistic is read for every group: the compiler can keep it in registers.
template <typename V>
struct Reader {
  // `pair`: the first second grid's place.
  inline Reader(const StatisticLayout& s, std::size_t pair)
      : kept(s.kept),
        second(s.kept == Kept::kCoded ? s.second.data() + pair * 2 : nullptr),
        step(s.kept == Kept::kCoded ? 2 : 0),
        spreader(V::spreader(s.bits)) {}

  inline __attribute__((always_inline)) typename V::Float read(const std::uint8_t* bytes) const {
    if (kept == Kept::kHalf) return V::halves(bytes);
    if (kept == Kept::kFloat) return V::floats(bytes);
    const typename V::Float code = V::spread(bytes, spreader);
    if (kept == Kept::kWhole) return code;
    return V::mul(V::sub(code, V::set(second[1])), V::set(second[0]));
  }
  inline __attribute__((always_inline)) void next() { second += step; }

  Kept kept;
  const float* second;
  std::size_t step;
  typename V::Spreader spreader;
};

// The statistics of the groups of a tile, one group after another. Where groups run along outputs,
// activations bring them: scales are 1, and zero points the middle code.
template <typename V>
class Cursor {
 public:
  using Float = typename V::Float;

  inline Cursor(const Weights& w, std::size_t tile)
      : next_(w.group_rows == 0 ? w.statistics.data() + tile * w.groups * w.group_bytes
                                : reinterpret_cast<const std::uint8_t*>(kOnes)),
        step_(w.group_bytes),
        zero_at_(w.zero.offset),
        scale_(w.scale, pair(w.scale, w, tile)),
        zero_(w.zero, pair(w.zero, w, tile)),
        middle_(static_cast<float>(1 << (w.bits - 1))) {
    if (w.group_rows == 0) return;
    step_ = scale_.step = zero_.step = 0;
    scale_.kept = Kept::kHalf;
    zero_.kept = Kept::kMiddle;
  }

  inline __attribute__((always_inline)) void advance(Float& scale, Float& zero) {
    scale = scale_.read(next_);
    zero = zero_.kept == Kept::kMiddle ? V::set(middle_) : zero_.read(next_ + zero_at_);
    scale_.next();
    zero_.next();
    next_ += step_;
  }

 private:
  static inline std::size_t pair(const StatisticLayout& s, const Weights& w, std::size_t tile) {
    return s.kept == Kept::kCoded && w.group_rows == 0 ? tile * kTile / s.span * w.groups : 0;
  }

  const std::uint8_t* next_;
  std::size_t step_, zero_at_;
  Reader<V> scale_, zero_;
  float middle_;
};

// The statistics of a group of outputs, those of some runs of 16 columns after others.
template <typename V>
class Lines {
 public:
  using Float = typename V::Float;

  inline Lines(const Weights& w, std::size_t group)
      : next_(w.statistics.data() + group * runs(w) * w.group_bytes),
        step_(w.group_bytes),
        zero_at_(w.zero.offset),
        scale_(w.scale, w.columns, group),
        zero_(w.zero, w.columns, group),
        middle_(static_cast<float>(1 << (w.bits - 1))) {}

  // Of the next `kRuns` runs. What they are kept as is looked up once for all of them.
  template <int kRuns>
  inline __attribute__((always_inline)) void advance(Float (&scale)[kRuns], Float (&zero)[kRuns]) {
    unroll<kRuns>([&](auto run) { __builtin_prefetch(next_ + run * step_ + kAhead, 0, 2); });
    scale_.template take<kRuns>(next_, step_, scale);
    if (zero_.reader.kept == Kept::kMiddle)
      for (Float& one : zero) one = V::set(middle_);
    else zero_.template take<kRuns>(next_ + zero_at_, step_, zero);
    next_ += kRuns * step_;
  }

 private:
  static inline std::size_t runs(const Weights& w) { return (w.columns + kTile - 1) / kTile; }

  // Some runs share a second grid.
  struct Spans {
    inline Spans(const StatisticLayout& s, std::size_t columns, std::size_t group)
        : reader(s, s.kept == Kept::kCoded ? group * ((columns + s.span - 1) / s.span) : 0),
          runs(s.kept == Kept::kCoded ? (s.span + kTile - 1) / kTile : ~std::size_t{0}),
          left(runs) {}
    template <int kRuns>
    inline __attribute__((always_inline)) void take(const std::uint8_t* bytes, std::size_t step,
                                                    Float (&found)[kRuns]) {
      if (reader.kept == Kept::kHalf)
        unroll<kRuns>([&](auto run) { found[run] = V::halves(bytes + run * step); });
      else if (reader.kept == Kept::kFloat)
        unroll<kRuns>([&](auto run) { found[run] = V::floats(bytes + run * step); });
      else
        unroll<kRuns>([&](auto run) {
          found[run] = V::spread(bytes + run * step, reader.spreader);
        });
      if (reader.kept != Kept::kCoded) return;
      unroll<kRuns>([&](auto run) {
        found[run] = V::mul(V::sub(found[run], V::set(reader.second[1])), V::set(reader.second[0]));
        if (--left != 0) return;
        left = runs;
        reader.next();
      });
    }
    Reader<V> reader;
    std::size_t runs, left;
  };

  const std::uint8_t* next_;
  std::size_t step_, zero_at_;
  Spans scale_, zero_;
  float middle_;
};

// Calls `chunk(codes)` for every chunk of a tile in order.
template <typename V, int kBits, typename F>
inline __attribute__((always_inline)) void each_chunk(const Weights& w, std::size_t tile,
                                                      F&& chunk) {
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

// Calls `work` with the bits of packed codes as a constant.
template <typename F>
inline void with_bits(int bits, F&& work) {
  switch (bits) {
#define QUANTINE_BITS(n) \
  case n:                \
    return work(std::integral_constant<int, n>{});
    QUANTINE_BITS(2)
    QUANTINE_BITS(3)
    QUANTINE_BITS(4)
    QUANTINE_BITS(5)
    QUANTINE_BITS(6)
    QUANTINE_BITS(7)
    QUANTINE_BITS(8)
#undef QUANTINE_BITS
  }
}

}  // namespace
}  // namespace quantine
