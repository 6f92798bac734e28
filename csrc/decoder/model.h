// What a language model consists of: the numbers of its parts, and whether they fit together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "decoder/attention.h"
#include "decoder/layers.h"
#include "decoder/packed_cache.h"
#include "integer/integer.h"
#include "matrix/matrix.h"

namespace quantine {

// The grid that inputs of matrices are rounded to, see `round_inputs`.
struct InputRounding {
  InputGrid grid;
  std::vector<std::size_t> ends;
};

// Outputs of a matrix that belong together: `runs` of `length` each, which begin at `offset` and
// are `stride` apart.
struct Slice {
  std::size_t offset, length, stride, runs;
};

struct Linear {
  std::shared_ptr<const Matrix> matrix;
  std::vector<float> bias;  // [outputs], or empty
  // Null: all rows of the matrix are outputs. Linears that are applied together are slices of the
  // same matrix, which is multiplied once, or none is a slice.
  std::optional<Slice> slice;
  // Null: inputs are not rounded. Linears that share one share the rounded inputs.
  std::shared_ptr<const InputRounding> rounding;
  // The same grid for groups of weights, where many rows are multiplied in integers.
  std::optional<InputGrid> integers;

  std::size_t outputs() const { return slice ? slice->length * slice->runs : matrix->rows(); }
};

struct Norm {
  std::vector<float> weight;
  std::vector<float> bias;  // empty: RMSNorm, else LayerNorm
  float eps;
  std::vector<std::uint32_t> order;  // output j is channel order[j]; empty: j
};

// The angles of every position, by which pairs of a head's first 2 * half numbers are rotated.
struct Rotary {
  std::vector<float> cos, sin;  // [capacity, half]
  std::size_t half;
  bool neighbours;  // pairs are (2 i, 2 i + 1); else (i, i + half)
};

struct DecoderBlock {
  std::optional<Norm> attention_norm, mlp_norm;    // of what attention and the MLP read
  std::optional<Norm> after_attention, after_mlp;  // of what is added to the residual stream
  // Before rotation: [dim], of each head, or [heads * dim], of all at once.
  std::optional<Norm> q_norm, k_norm;
  Linear q, k, v, o;
  Linear gate, up, down;  // without `gate` the MLP is down(activation(up(x)))
  Activation activation;
  std::shared_ptr<const Rotary> rotary;  // null: positions are not rotated
  float attention_scale;  // of queries, before they are rounded
  Scoring scoring;
  bool parallel;  // the MLP reads the residual stream as attention found it
  // Null: attention rounds nothing. Keys and values are then packed.
  std::shared_ptr<const AttentionRounding> states;
};

struct Model {
  Heads heads;
  std::shared_ptr<const Matrix> embedding;  // [vocabulary, hidden]
  float embedding_factor;
  std::shared_ptr<const Matrix> positions;  // learned, [offset + capacity or more, hidden]; or null
  std::size_t position_offset;
  std::optional<Norm> embedding_norm;  // of embeddings with what positions add
  std::vector<DecoderBlock> blocks;
  Norm norm;
  Linear head;
  float logit_cap;  // logits become cap * tanh(logit / cap); 0: they stay as they are
};

// Throws std::invalid_argument if shapes do not fit together, or there are fewer positions than
// `capacity`.
void check_shapes(const Model& model, std::size_t capacity);

// Rows of outputs of the widest MLP.
std::size_t widest_mlp(const Model& model);

}  // namespace quantine
