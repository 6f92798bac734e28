// Matrices in the order in which kernels read them, and products with them: what other stems and
// the bindings call. See docs/kernels.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/pool.h"

namespace quantine {

// How a product is computed. Exact: weights are decoded in registers and summed in float32. Fast:
// activations are rounded to 16 bit, with a scale for each block of at most 64 inputs.
enum class Arithmetic { kExact, kFast };

// How the statistics of a group are kept: as float16, as float32, as codes of a second grid, as
// codes that are their own values (zero points), or not at all (the middle code).
enum class Kept { kHalf, kFloat, kCoded, kWhole, kMiddle };

constexpr std::size_t kTile = 16;   // rows that are worked on at once
constexpr std::size_t kChunk = 4;   // inputs of a row that lie together
constexpr std::size_t kBlock = 64;  // inputs that share a scale of rounded activations, at most
// Codes of activations: their high and low parts both fit 8 bit with a sign, and no sum of products
// with 8 bit codes of weights over a block overflows 32 bit.
constexpr int kLargestCode = 127 * 256 + 127;
constexpr std::size_t kChunkBytes = kChunk * sizeof(std::int16_t);  // of such codes

// Chunks that lie together, so that they fill whole vectors of every plane: see docs/kernels.md.
constexpr int chunks_together(int bits) {
  return bits == 8 ? 1 : bits % 2 ? 8 : bits % 4 ? 4 : 2;
}

// Where the scales, or the zero points, of a tile's groups are.
struct StatisticLayout {
  Kept kept = Kept::kMiddle;
  int bits = 0;                           // of kCoded and kWhole
  std::size_t offset = 0;                 // in the bytes of a group
  std::size_t span = 0;                   // lines that share a second grid; of kCoded
  // [spans, groups, 2], along outputs [groups, spans, 2]: step and zero.
  std::vector<float> second;
};

// Consecutive stored columns within one group.
struct Block {
  std::uint32_t group;
  std::uint32_t first;   // stored column
  std::uint32_t width;   // columns; the rest of its chunks is padding
  std::uint32_t chunks;
};

// A buffer whose start fits vector loads, with room to read past its end.
class Bytes {
 public:
  Bytes() = default;
  explicit Bytes(std::size_t size);
  std::uint8_t* data() { return data_.get(); }
  const std::uint8_t* data() const { return data_.get(); }
  std::size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(std::uint8_t* data) const;
  };
  std::unique_ptr<std::uint8_t[], Free> data_;
  std::size_t size_ = 0;
};

// Everything a kernel reads of a matrix; see docs/kernels.md for the order of its bytes.
struct Weights {
  std::size_t rows = 0, columns = 0;
  std::size_t groups = 0;        // of a line: a row, or a column where they run along outputs
  std::size_t group_rows = 0;    // outputs of a group; 0: groups run along inputs
  int bits = 0;                  // 2 to 8; 16 and 32: plain floats, without groups
  std::size_t chunks = 0;        // of a row, padding included
  std::size_t padded = 0;        // inputs of a row of activations: whole vectors of chunks are read
  std::size_t tile_bytes = 0;    // codes of a tile
  std::size_t group_bytes = 0;   // statistics of a group of 16 lines
  Bytes codes, statistics;
  StatisticLayout scale, zero;
  std::vector<Block> blocks;
  std::size_t even_chunks = 0;      // of every block; 0 if they differ or do not fill vectors
  std::size_t blocks_per_group = 0;  // of every group of a row, if blocks are even
  std::vector<std::uint32_t> order;           // stored column j is input order[j]; empty: j
  std::vector<std::uint32_t> outlier_offsets;  // [tiles + 1], of outliers by row; empty: none
  std::vector<std::uint8_t> outlier_lanes;     // rows in their tile
  std::vector<std::uint32_t> outlier_columns;  // stored ones, if there are more than 2^16
  std::vector<std::uint16_t> outlier_short_columns;
  std::vector<std::uint16_t> outlier_halves;  // values in float16 where the code means zero,
  std::vector<float> outlier_floats;          // else what is to be added to the code's value
};

// Activations as kernels read them, one row after another.
struct Activations {
  std::size_t columns = 0, padded = 0, blocks = 0;
  const float* x = nullptr;             // [batch, columns], stored order
  // [batch / 16, columns, 16], rows beyond the last are zero: of several rows, for outliers.
  const float* turned = nullptr;
  const float* spread = nullptr;        // [batch, padded]; exact
  const std::uint8_t* codes = nullptr;  // [batch, padded / 4, 8], in the order of the level; fast
  const float* scales = nullptr;        // [batch, blocks]; fast
  const float* sums = nullptr;          // [batch, blocks], of codes; fast, null for scaled ones
  // [batch], of scaled ones: what zero points take off; exact, beyond the middle code.
  const float* offsets = nullptr;
  std::size_t first_lane = 0;  // rows of a tile before it are those of another group: not written
};

class Matrix {
 public:
  explicit Matrix(Weights weights) : weights_(std::move(weights)) {}
  const Weights& weights() const { return weights_; }
  std::size_t rows() const { return weights_.rows; }
  std::size_t columns() const { return weights_.columns; }
  std::size_t nbytes() const;

  // Rows from `first` as float32 or bfloat16 `[count, columns]`, in the order of the inputs.
  void decode(std::size_t first, std::size_t count, float* out, Pool& pool) const;
  void decode(std::size_t first, std::size_t count, std::uint16_t* out, Pool& pool) const;

 private:
  template <typename T, typename Decode>
  void decode_rows(std::size_t first, std::size_t count, T* out, Decode&& decode,
                   Pool& pool) const;

  Weights weights_;
};

struct Product {
  const Matrix* matrix;
  float* y;  // [batch, rows], overwritten
};

// Every product reads the same `x` `[batch, columns]`; one parallel step for all of them.
void multiply(const Product* products, std::size_t count, const float* x, std::size_t batch,
              Arithmetic arithmetic, Pool& pool);

// A product with activations of its own, such as those of the tokens that chose one expert.
struct OwnProduct {
  const Matrix* matrix;
  const float* x;     // [batch, columns]
  std::size_t batch;  // may be 0
  float* y;           // [batch, rows], overwritten
};

// One parallel step for all of them. Those that read the same activations arrange these once.
void multiply_grouped(const OwnProduct* products, std::size_t count, Arithmetic arithmetic,
                      Pool& pool);

// Whether this machine has instructions for products of bfloat16.
bool has_bfloat16();

// Instruction sets this machine has, the best one first, and the one in use.
std::vector<std::string> levels();
std::string level();
void use_level(const std::string& name);  // throws std::invalid_argument

}  // namespace quantine
