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

struct Linear {
  std::shared_ptr<const Matrix> matrix;
  std::vector<float> bias;  // [rows], or empty
  // Null: inputs are not rounded. Linears that share one share the rounded inputs.
  std::shared_ptr<const InputRounding> rounding;
  // The same grid for groups of weights, where many rows are multiplied in integers.
  std::optional<InputGrid> integers;
};

struct Norm {
  std::vector<float> weight;
  std::vector<float> bias;  // empty: RMSNorm, else LayerNorm
  float eps;
  std::vector<std::uint32_t> order;  // output j is channel order[j]; empty: j
};

// The angles of every position.
struct Rotary {
  std::vector<float> cos, sin;  // [capacity, dim / 2]
};

struct DecoderBlock {
  Norm attention_norm, mlp_norm;
  std::optional<Norm> after_attention, after_mlp;  // of what is added to the residual stream
  std::optional<Norm> q_norm, k_norm;              // [dim], of each head before it is rotated
  Linear q, k, v, o;
  Linear gate, up, down;  // without `gate` the MLP is down(activation(up(x)))
  Activation activation;
  std::shared_ptr<const Rotary> rotary;  // null: positions are not rotated
  float attention_scale;  // of queries, before they are rounded
  std::size_t window;     // tokens that a token sees, itself included
  // Null: attention rounds nothing. Keys and values are then packed.
  std::shared_ptr<const AttentionRounding> states;
};

struct Model {
  Heads heads;
  std::shared_ptr<const Matrix> embedding;  // [vocabulary, hidden]
  float embedding_factor;
  std::shared_ptr<const Matrix> positions;  // learned, [offset + capacity or more, hidden]; or null
  std::size_t position_offset;
  std::vector<DecoderBlock> blocks;
  Norm norm;
  Linear head;
};

// Throws std::invalid_argument if shapes do not fit together, or there are fewer positions than
// `capacity`.
void check_shapes(const Model& model, std::size_t capacity);

// Rows of outputs of the widest MLP.
std::size_t widest_mlp(const Model& model);

}  // namespace quantine
