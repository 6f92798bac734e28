// From packed weights and floats to products in integers, for any level: tiles of weights become
// bytes with a sign, rounded activations meet them, and what outliers and factors make is added.
#include "integer/integer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/half.h"
#include "base/lanes.h"
#include "integer/codes.h"
#include "matrix/level.h"

namespace quantine {
namespace {

// Of a thread's weights: half of a second level cache.
constexpr std::size_t kPanelBytes = 1u << 20;
constexpr std::size_t kMostTiles = 8;     // of a panel
constexpr std::size_t kPair = 2 * kTile;  // outputs of two tiles

// Whether zero points may differ from the whole numbers that codes of a byte can be less of.
bool has_rests(const Weights& w) {
  return w.zero.kept == Kept::kWhole ? w.bits == 8 : w.zero.kept != Kept::kMiddle;
}

// Whole numbers that codes become less by, so that a byte with a sign holds them; and what is left
// of the zero points. All are [groups, 16].
QUANTINE_CLONES
void offset(const float* zeros, std::size_t groups, int bits, std::uint8_t* offsets, float* lefts) {
  const float least = static_cast<float>(std::max(0, (1 << bits) - 128));
  for (std::size_t at = 0; at < groups * kTile; ++at) {
    const float whole = larger(least, nearest_code(zeros[at], 128.0f));
    offsets[at] = static_cast<std::uint8_t>(static_cast<int>(whole));
    lefts[at] = zeros[at] - whole;
  }
}

// From the sums of codes `totals` of a tile, [groups, 16]: what results begin with, for the zero
// points of inputs, with `scales` of weights made those of products; or the sums of weights, for
// rows with grids of their own.
QUANTINE_CLONES
void begin(const Codes& codes, const InputGrid& grid, const std::int32_t* totals,
           const float* lefts, float* scales, float* begin, float* sums) {
  double starts[kTile] = {}, weights[kTile] = {};
  for (std::size_t group = 0; group < codes.groups; ++group) {
    const std::size_t at = group * kTile;
    const bool shared = grid.scale.empty();
    const double width = static_cast<double>(codes.spans[group].width);
    const double zero = shared ? 0.0f : grid.zero[group];
    const float scale = shared ? 1.0f : grid.scale[group];
    for (std::size_t lane = 0; lane < kTile; ++lane) {
      scales[at + lane] *= scale;
      const double weight = static_cast<double>(scales[at + lane]) *
                            (totals[at + lane] - width * static_cast<double>(lefts[at + lane]));
      weights[lane] += weight;
      starts[lane] -= zero * weight;
    }
  }
  for (std::size_t lane = 0; lane < kTile; ++lane) {
    begin[lane] = static_cast<float>(starts[lane]);
    sums[lane] = static_cast<float>(weights[lane]);
  }
}

// Tiles of weights as `IntegerLevel` takes them.
class Unpacked {
 public:
  Unpacked(const Weights& w, const IntegerLevel& level, const RoundedRows& rows,
           const InputGrid& grid, std::size_t tiles)
      : w_(w),
        level_(level),
        rows_(rows),
        grid_(grid),
        plain_(w.padded * kTile),
        zeros_(w.groups * kTile),
        lefts_(w.groups * kTile),
        offsets_(w.groups * kTile),
        totals_(w.groups * kTile),
        codes_(tiles * rows.codes().stride * kTile),
        scales_(tiles * w.groups * kTile),
        rests_(has_rests(w) ? tiles * w.groups * kTile : 0),
        begin_(tiles * kTile),
        sums_(tiles * kTile) {}

  // Tile `tile` of the matrix becomes number `place`.
  void take(std::size_t tile, std::size_t place) {
    const std::size_t groups = w_.groups, first = place * groups * kTile;
    float* scales = scales_.data() + first;
    current_level().unpack(w_, tile, plain_.data(), scales, zeros_.data());
    offset(zeros_.data(), groups, w_.bits, offsets_.data(), lefts_.data());
    const std::uint8_t* codes = plain_.data();
    for (std::size_t group = 0; group < groups; ++group) codes = centre(codes, group, place);
    if (has_rests(w_)) std::copy_n(lefts_.data(), groups * kTile, rests_.data() + first);
    begin(rows_.codes(), grid_, totals_.data(), lefts_.data(), scales,
          begin_.data() + place * kTile, sums_.data() + place * kTile);
  }

  Panel panel() const {
    return {codes_.data(), scales_.data(), has_rests(w_) ? rests_.data() : nullptr, begin_.data()};
  }
  // Sums of weights, [tiles, 16], of rows with grids of their own.
  const float* sums() const { return sums_.data(); }

 private:
  // Codes of a group with a sign; padding is zero. Returns where the next group's begin.
  const std::uint8_t* centre(const std::uint8_t* codes, std::size_t group, std::size_t place) {
    const Span& span = rows_.codes().spans[group];
    const std::size_t chunks = (span.width + kChunk - 1) / kChunk;
    const std::size_t missing = chunks * kChunk - span.width;
    const std::uint8_t* offsets = offsets_.data() + group * kTile;
    std::int32_t* totals = totals_.data() + group * kTile;
    std::fill_n(totals, kTile, 0);
    std::int8_t* out = codes_.data() + (place * rows_.codes().stride + span.start) * kTile;
    level_.centre(codes, chunks, offsets, out, totals);
    std::int8_t* end = out + chunks * kTile * kChunk;
    if (missing != 0) {
      // Bytes of the last chunk that are no inputs became less by the offset, too.
      std::uint32_t words[kTile];
      std::memcpy(words, end - sizeof words, sizeof words);
      for (std::size_t lane = 0; lane < kTile; ++lane) {
        words[lane] &= 0xffffffffu >> (8 * missing);
        totals[lane] += static_cast<std::int32_t>(missing) * offsets[lane];
      }
      std::memcpy(end - sizeof words, words, sizeof words);
    }
    std::memset(end, 0, (span.padded - chunks * kChunk) * kTile);
    return codes + chunks * kTile * kChunk;
  }

  const Weights& w_;
  const IntegerLevel& level_;
  const RoundedRows& rows_;
  const InputGrid& grid_;
  Lines64<std::uint8_t> plain_;
  std::vector<float> zeros_, lefts_;
  std::vector<std::uint8_t> offsets_;
  std::vector<std::int32_t> totals_;
  Lines64<std::int8_t> codes_;
  std::vector<float> scales_;
  std::vector<float> rests_, begin_, sums_;
};

// Adds what the outliers of a tile make of `count` rows of activations `[columns, count]` to
// `results` `[count, 32]`.
QUANTINE_CLONES
void add_outliers(const Weights& w, std::size_t tile, const float* x, std::size_t count,
                  float* results) {
  std::size_t e = w.outlier_offsets[tile];
  const std::size_t end = w.outlier_offsets[tile + 1];
  while (e < end) {
    const std::size_t lane = w.outlier_lanes[e];
    float sums[kMostRows] = {};
    for (; e < end && w.outlier_lanes[e] == lane; ++e) {
      const std::size_t column =
          w.outlier_short_columns.empty() ? w.outlier_columns[e] : w.outlier_short_columns[e];
      const float value =
          w.outlier_halves.empty() ? w.outlier_floats[e] : half_to_float(w.outlier_halves[e]);
      const float* inputs = x + column * count;
      for (std::size_t r = 0; r < count; ++r) sums[r] += value * inputs[r];
    }
    for (std::size_t r = 0; r < count; ++r) results[r * kPair + lane] += sums[r];
  }
}

// A product that threads work on.
class Work {
 public:
  Work(const Weights& w, const InputGrid& grid, const IntegerLevel& level, const RoundedRows& rows,
       std::size_t batch, float* y, Pool& pool)
      : w_(w), grid_(grid), level_(level), rows_(rows), batch_(batch), y_(y) {
    tiles_ = (w.rows + kTile - 1) / kTile;
    const std::size_t held = kPanelBytes / (rows.codes().stride * kTile);
    const std::size_t fair = (tiles_ + 4 * pool.threads() - 1) / (4 * pool.threads());
    const std::size_t most = std::min({held, fair, batch > kTile ? kMostTiles : 2});
    together_ = std::max<std::size_t>(2, most / 2 * 2);
    if (w.outlier_offsets.empty()) return;
    values_.resize(w.columns * batch);
    pool.run((batch + level.rows - 1) / level.rows, [&](std::size_t index) {
      const std::size_t row = index * level_.rows;
      rows_.values(row, std::min(level_.rows, batch - row), values_.data() + row * w.columns);
    });
  }

  std::size_t tasks() const { return (tiles_ + together_ - 1) / together_; }

  void run(std::size_t task) const {
    const std::size_t first = task * together_, count = std::min(together_, tiles_ - first);
    Unpacked unpacked(w_, level_, rows_, grid_, count);
    for (std::size_t place = 0; place < count; ++place) unpacked.take(first + place, place);
    for (std::size_t row = 0; row < batch_; row += level_.rows)
      for (std::size_t place = 0; place < count; place += 2)
        pair(unpacked, first, place, std::min<std::size_t>(2, count - place), row);
  }

 private:
  // One or two tiles and the rows from `row` that meet them at once.
  void pair(const Unpacked& unpacked, std::size_t first, std::size_t place, std::size_t tiles,
            std::size_t row) const {
    alignas(64) float results[kMostRows * kPair];
    const std::size_t rows = std::min(level_.rows, batch_ - row);
    const std::size_t column = (first + place) * kTile;
    const std::size_t columns = std::min(tiles * kTile, w_.rows - column);
    for (std::size_t r = 0; r < rows; ++r) {
      const float* out = y_ + (row + r) * w_.rows + column;
      __builtin_prefetch(out, 1);
      __builtin_prefetch(out + columns - 1, 1);
    }
    level_.multiply(unpacked.panel(), place, tiles == 2, rows_.codes(), row, rows, results);
    if (rows_.own_grids()) scale(unpacked.sums() + place * kTile, row, rows, columns, results);
    if (!w_.outlier_offsets.empty())
      for (std::size_t t = 0; t < tiles; ++t)
        add_outliers(w_, first + place + t, values_.data() + row * w_.columns, rows,
                     results + t * kTile);
    if (rows_.has_factors())
      for (std::size_t r = 0; r < rows; ++r)
        for (std::size_t c = 0; c < columns; ++c) results[r * kPair + c] *= rows_.factor(row + r);
    for (std::size_t r = 0; r < rows; ++r) {
      float* out = y_ + (row + r) * w_.rows + column;
      if (rows_.is_lost(row + r))
        std::fill_n(out, columns, std::numeric_limits<float>::quiet_NaN());
      else if (columns == kPair)
        std::memcpy(out, results + r * kPair, kPair * sizeof(float));
      else
        std::memcpy(out, results + r * kPair, columns * sizeof(float));
    }
  }

  // Rows with grids of their own.
  void scale(const float* sums, std::size_t row, std::size_t rows, std::size_t columns,
             float* results) const {
    for (std::size_t r = 0; r < rows; ++r) {
      const float zero = rows_.zero(row + r), scale = rows_.scale(row + r);
      for (std::size_t c = 0; c < columns; ++c) {
        float& result = results[r * kPair + c];
        result = (result - zero * sums[c]) * scale;
      }
    }
  }

  const Weights& w_;
  const InputGrid& grid_;
  const IntegerLevel& level_;
  const RoundedRows& rows_;
  std::size_t batch_, tiles_, together_;
  float* y_;
  std::vector<float> values_;  // of rows that meet tiles at once, [columns, rows]; for outliers
};

}  // namespace

void multiply_integer(const Matrix& matrix, const InputGrid& grid, const float* x,
                      std::size_t batch, float* y, const std::string& name, Pool& pool) {
  const Weights& w = matrix.weights();
  const IntegerLevel& level = integer_level(name);
  const RoundedRows rows(w, grid, level, x, batch, has_rests(w), pool);
  const Work work(w, grid, level, rows, batch, y, pool);
  pool.run(work.tasks(), [&](std::size_t task) { work.run(task); });
}

void integer_codes(const Matrix& matrix, const InputGrid& grid, const float* x, std::size_t batch,
                   std::uint8_t* codes, Pool& pool) {
  const RoundedRows rows(matrix.weights(), grid, best_integer_level(), x, batch, false, pool);
  const Codes& found = rows.codes();
  for (std::size_t row = 0; row < batch; ++row)
    for (std::size_t group = 0; group < found.groups; ++group) {
      const Span& span = found.spans[group];
      std::memcpy(codes + row * matrix.columns() + span.column,
                  found.codes + row * found.stride + span.start, span.width);
    }
}

}  // namespace quantine
