// A whole language model, one call per token: embedding, pre-norm decoder blocks, head.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "base/pool.h"
#include "decoder/attention.h"
#include "decoder/layers.h"
#include "matrix/matrix.h"

namespace quantine {

struct Linear {
  std::shared_ptr<const Matrix> matrix;
  std::vector<float> bias;  // [rows], or empty
};

struct Norm {
  std::vector<float> weight;
  std::vector<float> bias;  // empty: RMSNorm, else LayerNorm
  float eps;
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
  float attention_scale;
  std::size_t window;  // tokens that a token sees, itself included
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

// A model with room for `capacity` tokens. All arithmetic is float32, except for what `arithmetic`
// allows in matrix products.
class Decoder {
 public:
  // Throws std::invalid_argument if shapes do not fit together.
  Decoder(Model model, std::size_t capacity, Arithmetic arithmetic, std::shared_ptr<Pool> pool);
  Decoder(const Decoder&) = delete;

  // Appends tokens; logits [vocabulary] are those after the last one. Nothing changes if this
  // throws: std::length_error if there is no room, std::invalid_argument for no token at all or one
  // that is not in the vocabulary.
  void append(const std::int64_t* tokens, std::size_t count, float* logits);
  // Forgets all tokens.
  void reset() { position_ = 0; }

  std::size_t position() const { return position_; }
  std::size_t capacity() const { return capacity_; }
  std::size_t vocabulary() const { return model_.embedding->rows(); }

 private:
  struct Application {
    const Linear& linear;
    float* y;
  };
  void check_shapes() const;
  void check_tokens(const std::int64_t* tokens, std::size_t count) const;
  void forward(const std::int64_t* tokens, std::size_t count);
  void embed(const std::int64_t* tokens, std::size_t count);
  void attend(const DecoderBlock& block, Cache& cache, std::size_t count);
  void place(const DecoderBlock& block, Cache& cache, std::size_t count);
  void run_mlp(const DecoderBlock& block, std::size_t count);
  void apply(std::initializer_list<Application> applications, const float* x, std::size_t count);
  void join(const std::optional<Norm>& norm, std::size_t count);

  std::size_t width() const { return model_.embedding->columns(); }

  Model model_;
  std::size_t capacity_;
  Arithmetic arithmetic_;
  std::shared_ptr<Pool> pool_;
  std::vector<Cache> caches_;
  Attention attention_;
  std::size_t position_ = 0;
  // Of up to kTokens tokens: the residual stream, the input of a matrix, and what matrices put out.
  std::vector<float> hidden_, input_, output_, q_, k_, v_, attended_, gate_, up_;
};

}  // namespace quantine
