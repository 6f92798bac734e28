// A whole language model, one call per token: embedding, decoder blocks, head.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "base/pool.h"
#include "decoder/attention.h"
#include "decoder/model.h"
#include "decoder/packed_cache.h"
#include "decoder/stage_clock.h"
#include "matrix/matrix.h"

namespace quantine {

// A model with room for `capacity` tokens. All arithmetic is float32, except for what `arithmetic`
// allows in matrix products, and products in integers: of `integer_rows` tokens or more, where
// linears have a grid for them.
class Decoder {
 public:
  // Throws std::invalid_argument if shapes do not fit together.
  Decoder(Model model, std::size_t capacity, Arithmetic arithmetic, std::size_t integer_rows,
          std::shared_ptr<Pool> pool);
  Decoder(const Decoder&) = delete;

  // Appends tokens; logits [vocabulary] are those after the last one. Nothing changes if this
  // throws: std::length_error if there is no room, std::invalid_argument for no token at all or one
  // that is not in the vocabulary.
  void append(const std::int64_t* tokens, std::size_t count, float* logits);
  // Forgets all tokens.
  void reset() { position_ = 0; }

  // Begins to add up what each stage takes, or no longer does.
  void time_stages(bool on) { clock_.turn(on); }
  const StageClock& clock() const { return clock_; }
  // What each stage reads for the next token: matrices, and the cache of keys and values.
  std::array<std::size_t, kStageNames.size()> stage_bytes() const;

  std::size_t position() const { return position_; }
  std::size_t capacity() const { return capacity_; }
  std::size_t vocabulary() const { return model_.embedding->rows(); }

 private:
  struct Application {
    const Linear& linear;
    float* y;
  };
  void check_tokens(const std::int64_t* tokens, std::size_t count) const;
  void forward(const std::int64_t* tokens, std::size_t count);
  void embed(const std::int64_t* tokens, std::size_t count);
  using AnyCache = std::variant<Cache, PackedCache>;
  void enter(const std::optional<Norm>& norm, std::size_t count);
  void attend(const DecoderBlock& block, AnyCache& cache, std::size_t count);
  void rotate_heads(const DecoderBlock& block, std::size_t count);
  void put(AnyCache& cache, std::size_t count);
  void run_mlp(const DecoderBlock& block, std::size_t count);
  void apply(std::initializer_list<Application> applications, const float* x, std::size_t count);
  void multiply_all(std::initializer_list<Application> applications, const float* x,
                    std::size_t count);
  const float* rounded(const InputRounding* rounding, const float* x, std::size_t count);
  void join(const std::optional<Norm>& norm, std::size_t count);

  std::size_t width() const { return model_.embedding->columns(); }

  Model model_;
  std::size_t capacity_;
  Arithmetic arithmetic_;
  std::size_t integer_rows_;
  std::string integer_level_;
  std::shared_ptr<Pool> pool_;
  std::vector<AnyCache> caches_;
  Attention attention_;
  PackedScratch scratch_;
  std::size_t position_ = 0;
  StageClock clock_;
  // Of up to kTokens tokens: the residual stream, the input of a matrix, and what matrices put out.
  std::vector<float> hidden_, input_, output_, q_, k_, v_, attended_, gate_, up_, rounded_, fused_;
};

}  // namespace quantine
