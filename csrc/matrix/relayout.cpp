// Cuts codes into planes by tiles, and lays statistics and outliers beside them: "A matrix in
// memory" in docs/kernels.md.
#include "matrix/relayout.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/half.h"

namespace quantine {
namespace {

std::size_t up(std::size_t count, std::size_t unit) { return (count + unit - 1) / unit; }

// Ends of groups of `group_size` columns, the last of which may be shorter.
std::vector<std::size_t> even_ends(std::size_t columns, std::size_t group_size) {
  std::vector<std::size_t> ends;
  for (std::size_t start = 0; start < columns; start += group_size)
    ends.push_back(std::min(columns, start + group_size));
  return ends;
}

// Columns cut into blocks that do not cross groups, which end at `ends`.
std::vector<Block> cut(const std::vector<std::size_t>& ends) {
  std::vector<Block> blocks;
  for (std::size_t group = 0; group < ends.size(); ++group) {
    const std::size_t end = ends[group];
    for (std::size_t first = group == 0 ? 0 : ends[group - 1]; first < end; first += kBlock) {
      const std::size_t width = std::min(kBlock, end - first);
      blocks.push_back({static_cast<std::uint32_t>(group),
                        static_cast<std::uint32_t>(first), static_cast<std::uint32_t>(width),
                        static_cast<std::uint32_t>(up(width, kChunk))});
    }
  }
  return blocks;
}

constexpr std::size_t kMostTogether = 8;

// Chunks of every block, if all are alike and whole vectors of chunks do not cut through blocks.
std::size_t even_chunks(const Weights& weights) {
  const std::size_t chunks = weights.blocks[0].chunks;
  const std::size_t per_group = std::max<std::size_t>(1, weights.blocks_per_group);
  for (std::size_t index = 0; index < weights.blocks.size(); ++index)
    if (weights.blocks[index].chunks != chunks || weights.blocks[index].group != index / per_group)
      return 0;
  const auto together = static_cast<std::size_t>(chunks_together(weights.bits));
  const std::size_t unit = std::max(chunks, together);
  const bool whole = unit % chunks == 0 && weights.chunks % unit == 0 && unit % together == 0;
  return whole ? chunks : 0;
}

std::size_t lines_of(const Source& source) {
  return source.along_outputs ? source.columns : source.rows;
}

// Values of a statistic, whatever holds them.
float value_of(const StatisticSource& source, std::size_t line, std::size_t group,
               std::size_t lines, std::size_t groups) {
  switch (source.kept) {
    case Kept::kHalf:
      return half_to_float(source.halves[line * groups + group]) * source.factor;
    case Kept::kWhole:
      return source.codes[line * groups + group];
    case Kept::kCoded: {
      const std::size_t place = group * up(lines, source.span) + line / source.span;
      const float code = source.codes[group * lines + line];
      return (code - half_to_float(source.zeros[place])) *
             (half_to_float(source.steps[place]) * source.factor);
    }
    default:
      return static_cast<float>(1 << (source.bits - 1));
  }
}

// How a kernel reads a statistic. A second grid has to be that of 16 whole lines, and float16 has
// no room for a factor.
StatisticLayout plan(const StatisticSource& source, std::size_t lines, std::size_t groups,
                     bool along_outputs) {
  StatisticLayout found;
  found.kept = source.kept;
  found.bits = source.bits;
  if (source.kept == Kept::kHalf && source.factor != 1.0f) found.kept = Kept::kFloat;
  if (source.kept != Kept::kCoded) return found;
  found.span = source.span;
  if (source.span % kTile != 0 && source.span < lines) {
    found.kept = Kept::kFloat;
    return found;
  }
  const std::size_t spans = up(lines, source.span);
  found.second.resize(spans * groups * 2);
  for (std::size_t span = 0; span < spans; ++span)
    for (std::size_t group = 0; group < groups; ++group) {
      const std::size_t place = along_outputs ? group * spans + span : span * groups + group;
      float* pair = &found.second[place * 2];
      pair[0] = half_to_float(source.steps[group * spans + span]) * source.factor;
      pair[1] = half_to_float(source.zeros[group * spans + span]);
    }
  return found;
}

std::size_t bytes_of(const StatisticLayout& statistic) {
  switch (statistic.kept) {
    case Kept::kHalf:
      return kTile * sizeof(std::uint16_t);
    case Kept::kFloat:
      return kTile * sizeof(float);
    case Kept::kMiddle:
      return 0;
    default:
      return kTile * static_cast<std::size_t>(statistic.bits) / 8;
  }
}

// Of 16 lines from `first`.
void write_statistic(const StatisticSource& source, const StatisticLayout& statistic,
                     std::size_t first, std::size_t group, std::size_t lines, std::size_t groups,
                     std::uint8_t* out) {
  const std::size_t lanes = std::min(kTile, lines - first);
  for (std::size_t lane = 0; lane < lanes; ++lane) {
    const std::size_t line = first + lane;
    if (statistic.kept == Kept::kHalf) {
      std::memcpy(out + lane * 2, &source.halves[line * groups + group], 2);
    } else if (statistic.kept == Kept::kFloat) {
      const float value = value_of(source, line, group, lines, groups);
      std::memcpy(out + lane * 4, &value, 4);
    } else if (statistic.kept != Kept::kMiddle) {
      const bool whole = statistic.kept == Kept::kWhole;
      const std::uint32_t code = source.codes[whole ? line * groups + group : group * lines + line];
      const std::size_t bit = lane * static_cast<std::size_t>(statistic.bits);
      const std::uint32_t shifted = code << (bit % 8);
      out[bit / 8] |= static_cast<std::uint8_t>(shifted);
      if (shifted > 0xff) out[bit / 8 + 1] |= static_cast<std::uint8_t>(shifted >> 8);
    }
  }
}

// The four codes of a chunk of one row, in the vectors of `kBits`: one lane of every plane.
template <int kBits>
struct ChunkWriter {
  static constexpr int kTogether = chunks_together(kBits);
  static constexpr int kVectors = kBits * kTogether / 8;

  // Adds the codes of chunk `place` of those that lie together.
  static void add(std::uint32_t word, int place, std::uint32_t* planes) {
    if constexpr (kBits == 8) {
      planes[0] = word;
      return;
    }
    constexpr int kFour = kBits & 4 ? kTogether / 2 : 0, kTwo = kBits & 2 ? kTogether / 4 : 0;
    if constexpr ((kBits & 4) != 0)
      planes[place / 2] |= (word & 0x0f0f0f0fu) << (4 * (place % 2));
    if constexpr ((kBits & 2) != 0)
      planes[kFour + place / 4] |= (word >> (kBits & 4) & 0x03030303u) << (2 * (place % 4));
    if constexpr ((kBits & 1) != 0)
      planes[kFour + kTwo] |= (word >> (kBits & 6) & 0x01010101u) << place;
  }

  static void row(const std::uint8_t* codes, const std::vector<Block>& blocks, std::uint8_t* out) {
    std::uint32_t planes[kVectors] = {};
    int place = 0;
    const auto flush = [&] {
      for (int v = 0; v < kVectors; ++v) std::memcpy(out + 64 * v, &planes[v], 4);
      std::memset(planes, 0, sizeof planes);
      out += 64 * kVectors;
      place = 0;
    };
    const auto take = [&](std::uint32_t word) {
      add(word, place, planes);
      if (++place == kTogether) flush();
    };
    for (const Block& block : blocks) {
      const std::uint8_t* code = codes + block.first;
      std::uint32_t word;
      for (std::uint32_t left = block.width / 4; left > 0; --left, code += 4) {
        std::memcpy(&word, code, 4);
        take(word);
      }
      if (block.width % 4 == 0) continue;
      word = 0;
      std::memcpy(&word, code, block.width % 4);
      take(word);
    }
    if (place != 0) flush();
  }
};

void write_codes(const Source& source, const Weights& weights, std::size_t tile,
                 std::uint8_t* out) {
  using Row = void (*)(const std::uint8_t*, const std::vector<Block>&, std::uint8_t*);
  constexpr Row kRows[] = {ChunkWriter<2>::row, ChunkWriter<3>::row, ChunkWriter<4>::row,
                           ChunkWriter<5>::row, ChunkWriter<6>::row, ChunkWriter<7>::row,
                           ChunkWriter<8>::row};
  const std::size_t lanes = std::min(kTile, weights.rows - tile * kTile);
  for (std::size_t lane = 0; lane < lanes; ++lane)
    kRows[source.bits - 2](source.codes + (tile * kTile + lane) * source.columns, weights.blocks,
                           out + lane * kChunk);
}

// An outlier replaces its code. Where the grid has an exact zero, the code is made to mean that;
// else what the code means is taken off the value.
void write_outliers(const Source& source, Weights& weights, const std::vector<std::size_t>& ends,
                    std::vector<std::uint8_t>& codes) {
  const std::size_t entries = static_cast<std::size_t>(source.outlier_offsets[source.rows]);
  weights.outlier_lanes.resize(entries);
  for (std::size_t row = 0; row < source.rows; row += kTile)
    weights.outlier_offsets.push_back(static_cast<std::uint32_t>(source.outlier_offsets[row]));
  weights.outlier_offsets.push_back(static_cast<std::uint32_t>(entries));
  const bool narrow = source.columns <= 65536;
  if (narrow)
    weights.outlier_short_columns.assign(source.outlier_columns, source.outlier_columns + entries);
  else
    weights.outlier_columns.assign(source.outlier_columns, source.outlier_columns + entries);
  const bool exact_zero = source.zero.kept == Kept::kWhole || source.zero.kept == Kept::kMiddle;
  const bool halves = exact_zero && source.outlier_halves != nullptr;
  if (halves)
    weights.outlier_halves.assign(source.outlier_halves, source.outlier_halves + entries);
  else
    weights.outlier_floats.resize(entries);
  for (std::size_t row = 0; row < source.rows; ++row) {
    const std::int64_t end = source.outlier_offsets[row + 1];
    for (std::int64_t at = source.outlier_offsets[row]; at < end; ++at) {
      const std::size_t e = static_cast<std::size_t>(at);
      const std::size_t column = static_cast<std::size_t>(source.outlier_columns[e]);
      weights.outlier_lanes[e] = static_cast<std::uint8_t>(row % kTile);
      const std::size_t line = source.along_outputs ? column : row;
      const auto along = std::upper_bound(ends.begin(), ends.end(), column) - ends.begin();
      const std::size_t group =
          source.along_outputs ? row / source.group_size : static_cast<std::size_t>(along);
      const float zero = value_of(source.zero, line, group, lines_of(source), weights.groups);
      std::uint8_t& code = codes[row * source.columns + column];
      if (halves) {
        code = static_cast<std::uint8_t>(zero);
        continue;
      }
      const float scale = value_of(source.scale, line, group, lines_of(source), weights.groups);
      const float value = source.outlier_floats != nullptr
                              ? source.outlier_floats[e]
                              : half_to_float(source.outlier_halves[e]);
      weights.outlier_floats[e] = value - (static_cast<float>(code) - zero) * scale;
    }
  }
}

// Of 16 lines from `first`, for all groups: one group after another, or one group's lines after
// another where a kernel reads those of all columns.
void write_statistics(const Source& source, Weights& weights, std::size_t first) {
  const std::size_t lines = lines_of(source), runs = up(lines, kTile), run = first / kTile;
  for (std::size_t group = 0; group < weights.groups; ++group) {
    const std::size_t place =
        source.along_outputs ? group * runs + run : run * weights.groups + group;
    std::uint8_t* out = weights.statistics.data() + place * weights.group_bytes;
    write_statistic(source.scale, weights.scale, first, group, lines, weights.groups, out);
    write_statistic(source.zero, weights.zero, first, group, lines, weights.groups,
                    out + weights.zero.offset);
  }
}

template <typename T>
Weights plain(const T* values, std::size_t rows, std::size_t columns, Pool& pool) {
  Weights weights;
  weights.rows = rows;
  weights.columns = columns;
  weights.bits = static_cast<int>(8 * sizeof(T));
  weights.tile_bytes = columns * kTile * sizeof(T);
  weights.blocks = cut({columns});
  const std::size_t tiles = up(rows, kTile);
  weights.codes = Bytes(tiles * weights.tile_bytes);
  pool.run(tiles, [&](std::size_t tile) {
    T* out = reinterpret_cast<T*>(weights.codes.data() + tile * weights.tile_bytes);
    for (std::size_t lane = 0; lane < std::min(kTile, rows - tile * kTile); ++lane)
      for (std::size_t column = 0; column < columns; ++column)
        out[column * kTile + lane] = values[(tile * kTile + lane) * columns + column];
  });
  return weights;
}

}  // namespace

Weights relayout(const Source& source, Pool& pool) {
  Weights weights;
  weights.rows = source.rows;
  weights.columns = source.columns;
  weights.bits = source.bits;
  const bool outputs = source.along_outputs;
  const std::size_t lines = lines_of(source);
  const std::vector<std::size_t> ends =
      outputs               ? std::vector<std::size_t>{source.columns}
      : source.ends.empty() ? even_ends(source.columns, source.group_size)
                            : source.ends;
  weights.groups = outputs ? up(source.rows, source.group_size) : ends.size();
  weights.group_rows = outputs ? source.group_size : 0;
  weights.blocks = cut(ends);
  for (const Block& block : weights.blocks) weights.chunks += block.chunks;
  const std::size_t together = static_cast<std::size_t>(chunks_together(source.bits));
  weights.tile_bytes = up(weights.chunks, together) * together * kChunk * kTile *
                       static_cast<std::size_t>(source.bits) / 8;
  weights.padded = up(weights.chunks, kMostTogether) * kMostTogether * kChunk;
  weights.blocks_per_group = weights.blocks.size() / (outputs ? 1 : weights.groups);
  weights.even_chunks = even_chunks(weights);
  weights.scale = plan(source.scale, lines, weights.groups, outputs);
  weights.zero = plan(source.zero, lines, weights.groups, outputs);
  weights.zero.offset = bytes_of(weights.scale);
  weights.group_bytes = weights.zero.offset + bytes_of(weights.zero);
  if (source.order != nullptr) weights.order.assign(source.order, source.order + source.columns);

  Source changed = source;
  std::vector<std::uint8_t> codes;
  if (source.outlier_offsets != nullptr) {
    codes.assign(source.codes, source.codes + source.rows * source.columns);
    write_outliers(source, weights, ends, codes);
    changed.codes = codes.data();
  }
  const std::size_t tiles = up(source.rows, kTile);
  weights.codes = Bytes(tiles * weights.tile_bytes);
  pool.run(tiles, [&](std::size_t tile) {
    write_codes(changed, weights, tile, weights.codes.data() + tile * weights.tile_bytes);
  });
  const std::size_t runs = up(lines, kTile);
  weights.statistics = Bytes(runs * weights.groups * weights.group_bytes);
  pool.run(runs, [&](std::size_t run) { write_statistics(source, weights, run * kTile); });
  return weights;
}

Weights relayout(const std::uint16_t* values, std::size_t rows, std::size_t columns, Pool& pool) {
  return plain(values, rows, columns, pool);
}

Weights relayout(const float* values, std::size_t rows, std::size_t columns, Pool& pool) {
  return plain(values, rows, columns, pool);
}

}  // namespace quantine
