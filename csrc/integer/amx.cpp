// Compiled for AMX; called only where the processor has it, AVX-512 with VNNI, and the system's
// permission.
#include <immintrin.h>

#include "base/amx.h"
#include "integer/avx512.h"

namespace quantine {
namespace {

constexpr std::size_t kLanes = 16, kStep = 64, kVector = 64;
constexpr std::size_t kFewRows = 8;  // that tiles would hardly be filled with
constexpr std::size_t kFewSteps = 2;  // sums of groups that are stored while others are made
constexpr std::size_t kStrip = 32;  // rows of activations, and outputs, of four tiles of sums

// Sums of a group, [2, 2, 16, 16]: of 16 rows and both tiles; then of the next 16 rows.
struct alignas(64) Sums {
  std::int32_t at[4][256];
};

// 32 rows of activations meet one or two tiles. Tiles of sums are 0 and 1, of the next 16 rows 2
// and 3. While the one pair is stored, the other is summed: tiles have to wait for their products.
template <bool kTwo>
class Strip {
 public:
  Strip(const Panel& panel, std::size_t tile, const Codes& a, std::size_t row, float* results)
      : panel_(panel), tile_(tile), a_(a), row_(row), results_(results) {}

  void run() {
    for (std::size_t r = 0; r < kStrip; ++r)
      for (std::size_t t = 0; t < kTiles; ++t)
        _mm512_store_ps(results_ + r * kStrip + t * kLanes,
                        _mm512_loadu_ps(panel_.begin + (tile_ + t) * kLanes));
    Sums sums[2];
    for (std::size_t group = 0; group < a_.groups; ++group) {
      Sums& before = sums[(group + 1) % 2];
      if (a_.spans[group].padded <= kFewSteps * kStep) few(group, sums[group % 2], before);
      else several(group, sums[group % 2], before);
    }
    Sums& last = sums[(a_.groups + 1) % 2];
    store_lower(last);
    add(a_.groups, last, 0);
    add(a_.groups, last, 1);
  }

 private:
  static constexpr std::size_t kTiles = kTwo ? 2 : 1;

  const std::uint8_t* inputs(std::size_t group) const {
    return a_.codes + row_ * a_.stride + a_.spans[group].start;
  }
  const std::int8_t* weights(std::size_t group) const {
    return panel_.codes + (tile_ * a_.stride + a_.spans[group].start) * kLanes;
  }

  static void begin_upper() {
    _tile_zero(0);
    if constexpr (kTwo) _tile_zero(1);
  }
  static void begin_lower() {
    _tile_zero(2);
    if constexpr (kTwo) _tile_zero(3);
  }
  void load_weights(const std::int8_t* w) const {
    _tile_loadd(6, w, kVector);
    if constexpr (kTwo) _tile_loadd(7, w + a_.stride * kLanes, kVector);
  }
  static void sum_upper() {
    _tile_dpbusd(0, 4, 6);
    if constexpr (kTwo) _tile_dpbusd(1, 4, 7);
  }
  static void sum_lower() {
    _tile_dpbusd(2, 5, 6);
    if constexpr (kTwo) _tile_dpbusd(3, 5, 7);
  }
  static void store_upper(Sums& sums) {
    _tile_stored(0, sums.at[0], kVector);
    if constexpr (kTwo) _tile_stored(1, sums.at[1], kVector);
  }
  static void store_lower(Sums& sums) {
    _tile_stored(2, sums.at[2], kVector);
    if constexpr (kTwo) _tile_stored(3, sums.at[3], kVector);
  }

  // A group of one or two steps.
  void few(std::size_t group, Sums& sums, Sums& before) {
    const std::uint8_t* x = inputs(group);
    const std::uint8_t* lower = x + 16 * a_.stride;
    const std::int8_t* w = weights(group);
    const bool more = a_.spans[group].padded > kStep;
    load_weights(w);
    begin_upper();
    _tile_loadd(4, x, a_.stride);
    sum_upper();
    if (more) {
      load_weights(w + kStep * kLanes);
      _tile_loadd(4, x + kStep, a_.stride);
      sum_upper();
    }
    if (group > 0) {
      store_lower(before);
      add(group, before, 0);
    }
    begin_lower();
    if (more) {
      _tile_loadd(5, lower + kStep, a_.stride);
      sum_lower();
      load_weights(w);
    }
    _tile_loadd(5, lower, a_.stride);
    sum_lower();
    store_upper(sums);
    if (group > 0) add(group, before, 1);
  }

  void several(std::size_t group, Sums& sums, Sums& before) {
    const std::uint8_t* x = inputs(group);
    const std::int8_t* w = weights(group);
    if (group > 0) store_lower(before);
    begin_upper();
    begin_lower();
    for (std::size_t i = 0; i < a_.spans[group].padded; i += kStep) {
      load_weights(w + i * kLanes);
      _tile_loadd(4, x + i, a_.stride);
      _tile_loadd(5, x + i + 16 * a_.stride, a_.stride);
      sum_upper();
      sum_lower();
    }
    store_upper(sums);
    if (group > 0) {
      add(group, before, 0);
      add(group, before, 1);
    }
  }

  // Adds the sums of the group before `group`, of the upper or lower 16 rows, to their results.
  void add(std::size_t group, const Sums& sums, std::size_t half) {
    for (std::size_t t = 0; t < kTiles; ++t)
      add_tile(group - 1, sums.at[2 * half + t], tile_ + t, row_ + 16 * half,
               results_ + 16 * half * kStrip + t * kLanes);
  }

  void add_tile(std::size_t group, const std::int32_t* sums, std::size_t tile, std::size_t row,
                float* results) {
    const std::size_t place = (tile * a_.groups + group) * kLanes;
    const __m512 scale = _mm512_loadu_ps(panel_.scales + place);
    if (panel_.rests == nullptr) {
      for (std::size_t r = 0; r < 16; ++r) {
        const __m512 whole = _mm512_cvtepi32_ps(_mm512_load_si512(sums + r * kLanes));
        float* result = results + r * kStrip;
        _mm512_store_ps(result, _mm512_fmadd_ps(whole, scale, _mm512_load_ps(result)));
      }
      return;
    }
    const __m512 rest = _mm512_loadu_ps(panel_.rests + place);
    for (std::size_t r = 0; r < 16; ++r) {
      const __m512 codes = _mm512_set1_ps(a_.sums[(row + r) * a_.groups + group]);
      const __m512 whole = _mm512_cvtepi32_ps(_mm512_load_si512(sums + r * kLanes));
      float* result = results + r * kStrip;
      _mm512_store_ps(result, _mm512_fmadd_ps(_mm512_fnmadd_ps(rest, codes, whole), scale,
                                              _mm512_load_ps(result)));
    }
  }

  const Panel& panel_;
  std::size_t tile_;
  const Codes& a_;
  std::size_t row_;
  float* results_;
};

void multiply(const Panel& panel, std::size_t tile, bool two, const Codes& a, std::size_t row,
              std::size_t rows, float* results) {
  if (rows <= kFewRows) return multiply_avx512(panel, tile, two, a, row, rows, results);
  const TileConfiguration configuration;
  _tile_loadconfig(&configuration);
  for (std::size_t done = 0; done < rows; done += kStrip) {
    float* strip = results + done * kStrip;
    if (two) Strip<true>(panel, tile, a, row + done, strip).run();
    else Strip<false>(panel, tile, a, row + done, strip).run();
  }
  _tile_release();
}

}  // namespace

bool allow_integer_tiles() { return ask_for_tiles(kHasIntegerTiles); }

const IntegerLevel& integer_amx() {
  static const IntegerLevel level = {"amx", kStep, kStrip, round_avx512, centre_avx512, multiply};
  return level;
}

}  // namespace quantine
