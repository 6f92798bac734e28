// A whole language model, one call per token, or for a token of each of several texts: embedding,
// decoder blocks, head.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/pool.h"
#include "decoder/attention.h"
#include "decoder/model.h"
#include "decoder/packed_cache.h"
#include "decoder/stage_clock.h"
#include "decoder/text.h"
#include "matrix/matrix.h"

namespace quantine {

// A model with room for `texts` texts of `capacity` tokens. Threads that append or truncate take
// turns, whichever texts these are: all share what a pass works on. All arithmetic is float32, except for
// what `arithmetic` allows in matrix products, and products in integers: of `integer_rows` tokens
// or more that are appended at once, where linears have a grid for them.
class Decoder {
 public:
  // Throws std::invalid_argument if shapes do not fit together.
  Decoder(Model model, std::size_t capacity, std::size_t texts, Arithmetic arithmetic,
          std::size_t integer_rows, std::shared_ptr<Pool> pool);
  Decoder(const Decoder&) = delete;

  // Appends tokens to a text; logits [vocabulary] are those after the last one. Nothing changes if
  // this throws: std::length_error if there is no room, std::invalid_argument for no token at all,
  // one that is not in the vocabulary, or a text that there is not.
  void append(std::size_t text, const std::int64_t* tokens, std::size_t count, float* logits);
  // Appends tokens[row] to texts[row], row after row; logits [count, vocabulary] are those after
  // each. They share each look at the weights, and have the bits that they would have if each was
  // appended alone. Throws as `append` does.
  void step(const std::size_t* texts, const std::int64_t* tokens, std::size_t count, float* logits);
  // Forgets the tokens of a text from `position` on, if there are any.
  void truncate(std::size_t text, std::size_t position);

  // Begins to add up what each stage takes, or no longer does.
  void time_stages(bool on) { clock_.turn(on); }
  const StageClock& clock() const { return clock_; }
  // What each stage reads for the next token of the first text: matrices, and the cache of keys and
  // values.
  std::array<std::size_t, kStageNames.size()> stage_bytes() const;

  std::size_t texts() const { return texts_.size(); }
  std::size_t position(std::size_t text) const { return texts_.at(text).position; }
  std::size_t capacity() const { return capacity_; }
  std::size_t vocabulary() const { return model_.embedding->rows(); }

 private:
  struct Application {
    const Linear& linear;
    float* y;
  };
  void check(const std::size_t* texts, const std::int64_t* tokens, std::size_t count) const;
  void forward(const std::int64_t* tokens, const Pass& pass);
  void embed(const std::int64_t* tokens, const Pass& pass);
  void enter(const std::optional<Norm>& norm, std::size_t count);
  void attend(std::size_t index, const Pass& pass);
  void attend_text(const DecoderBlock& block, const AnyCache& cache, const Stretch& stretch);
  void rotate_heads(const DecoderBlock& block, const Pass& pass);
  void run_mlp(const DecoderBlock& block, const Pass& pass);
  void score(const float* hidden, const Pass& pass, float* logits);
  void apply(std::initializer_list<Application> applications, const float* x, const Pass& pass);
  void multiply_all(std::initializer_list<Application> applications, const float* x,
                    const Pass& pass);
  const float* rounded(const InputRounding* rounding, const float* x, std::size_t count);
  void join(const std::optional<Norm>& norm, std::size_t count);

  std::size_t width() const { return model_.embedding->columns(); }

  std::mutex turn_;
  Model model_;
  std::size_t capacity_;
  Arithmetic arithmetic_;
  std::size_t integer_rows_;
  std::string integer_level_;
  std::shared_ptr<Pool> pool_;
  std::vector<Text> texts_;
  Attention attention_;
  PackedScratch scratch_;
  StageClock clock_;
  // Of up to kTokens tokens: the residual stream, the input of a matrix, and what matrices put out.
  std::vector<float> hidden_, input_, output_, q_, k_, v_, attended_, gate_, up_, rounded_, fused_;
};

}  // namespace quantine
