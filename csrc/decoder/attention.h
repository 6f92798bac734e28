// Attention of a few new tokens over all tokens so far, and the cache of keys and values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/pool.h"
#include "decoder/attention_span.h"
#include "decoder/memory.h"
#include "matrix/matrix.h"

namespace quantine {

// Sizes of attention: each key-value head serves heads / kv_heads query heads.
struct Heads {
  std::size_t heads;
  std::size_t kv_heads;
  std::size_t dim;
};

// What is added to scores, by head and by position of the key.
struct ScoreBias {
  std::vector<float> values;  // [heads, capacity]

  const float* of(std::size_t head, std::size_t heads) const {
    return values.data() + head * (values.size() / heads);
  }
};

// Which keys a query meets, and what becomes of its products with them.
struct Scoring {
  std::size_t window;  // tokens that a token sees, itself included
  float cap;           // scores become cap * tanh(score / cap); 0: they stay as they are
  std::shared_ptr<const ScoreBias> bias;  // of scores once they are capped; null: none
};

// Keys and values of one decoder block for up to `capacity` tokens. Exact: float32. Fast: whole
// numbers of 16 bits, and a float32 scale for each head of each token.
//
//   keys    [kv_heads, blocks, dim, kKeyLanes]: tokens are innermost, so that scores vectorize
//   values  [kv_heads, capacity, dim rounded up to whole vectors]
//   scales  [kv_heads, capacity] each; fast
class Cache {
 public:
  Cache(Heads heads, std::size_t capacity, Arithmetic arithmetic);
  // Puts the keys and values, [kv_heads, dim] each, of the token at `position`.
  void put(std::size_t position, const float* keys, const float* values);
  bool is_exact() const { return key_scales_ == nullptr; }
  // What attention reads of a token.
  std::size_t token_bytes() const {
    const std::size_t item = is_exact() ? sizeof(float) : sizeof(std::int16_t);
    const std::size_t scales = is_exact() ? 0 : 2 * sizeof(float);
    return heads_.kv_heads * ((heads_.dim + width_) * item + scales);
  }

  // Of one head, from a `position` on; that of keys is a multiple of kKeyLanes. T is float if the
  // cache is exact, else std::int16_t.
  template <typename T>
  const T* keys(std::size_t kv_head, std::size_t position) const {
    return at<T>(keys_) + (kv_head * capacity_ + position) * heads_.dim;
  }
  template <typename T>
  const T* values(std::size_t kv_head, std::size_t position) const {
    return at<T>(values_) + (kv_head * capacity_ + position) * width_;
  }
  const float* key_scales(std::size_t kv_head, std::size_t position) const {
    return at<float>(key_scales_) + kv_head * capacity_ + position;
  }
  const float* value_scales(std::size_t kv_head, std::size_t position) const {
    return at<float>(value_scales_) + kv_head * capacity_ + position;
  }

 private:
  template <typename T>
  static T* at(const Memory& memory) {
    return static_cast<T*>(memory.get());
  }
  template <typename T>
  void put_row(std::size_t kv_head, std::size_t position, const T* keys, const T* values);

  Heads heads_;
  std::size_t capacity_;  // rounded up to whole blocks
  std::size_t width_;     // of a row of values
  Memory keys_, values_, key_scales_, value_scales_;
};

// The tokens are cut into spans which are attended to independently, on any thread, and then
// merged in order. Where spans begin depends on positions only: threads do not change results.
class Attention {
 public:
  Attention(Heads heads, std::size_t capacity, std::size_t most_tokens);
  // Queries [tokens, heads, dim], already scaled, of the tokens at positions first, first + 1, ...
  // whose keys and values are in the cache; out [tokens, heads, dim]. Each attends to itself and to
  // tokens before it.
  void run(const Cache& cache, const float* queries, std::size_t tokens, std::size_t first,
           const Scoring& scoring, float* out, Pool& pool);

 private:
  float* partial(std::size_t token, std::size_t head, std::size_t span);
  template <typename T>
  SpanOf<T> tokens_of(const Cache& cache, std::size_t kv_head, std::size_t start) const;
  void attend(const Cache& cache, const float* queries, std::size_t kv_head, std::size_t span);
  template <typename T>
  void attend(const SpanOf<T>& tokens, const float* queries, std::size_t kv_head,
              std::size_t span);
  void merge(std::size_t token, std::size_t head, float* out);
  std::size_t begin(std::size_t token) const;  // the first position that `token` attends to

  Heads heads_;
  std::size_t spans_;            // of the whole capacity
  std::size_t stride_;           // of partials
  std::vector<float> partials_;  // [tokens, heads, spans, stride]: weighted values, maximum, sum
  std::size_t tokens_ = 0, first_ = 0;  // of the current run
  const Scoring* scoring_ = nullptr;    // likewise
};

}  // namespace quantine
