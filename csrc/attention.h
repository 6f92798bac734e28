// Attention of a few new tokens over all tokens so far.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <vector>

#include "pool.h"

namespace quantine {

// Sizes of attention: each key-value head serves heads / kv_heads query heads.
struct Heads {
  std::size_t heads;
  std::size_t kv_heads;
  std::size_t dim;
};

// Keys and values of one decoder block for up to `capacity` tokens, float32.
//
//   keys    [kv_heads, blocks, dim, kKeyLanes]: tokens are innermost, so that scores vectorize
//   values  [kv_heads, capacity, dim]
class Cache {
 public:
  Cache(Heads heads, std::size_t capacity);
  // Puts the keys and values, [kv_heads, dim] each, of the token at `position`.
  void put(std::size_t position, const float* keys, const float* values);
  // Of one head, from a `position` that is a multiple of kKeyLanes.
  const float* keys(std::size_t kv_head, std::size_t position) const;
  const float* values(std::size_t kv_head, std::size_t position) const;

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  using Memory = std::unique_ptr<float[], Free>;
  static Memory zeros(std::size_t count);

  Heads heads_;
  std::size_t capacity_;  // rounded up to whole blocks
  Memory keys_, values_;
};

// The tokens are cut into spans which are attended to independently, on any thread, and then
// merged in order. Where spans begin depends on positions only: threads do not change results.
class Attention {
 public:
  Attention(Heads heads, std::size_t capacity, std::size_t most_tokens);
  // Queries [tokens, heads, dim], already scaled, of the tokens at positions first, first + 1, ...
  // whose keys and values are in the cache; out [tokens, heads, dim]. Each attends to itself and to
  // the `window` - 1 tokens before it.
  void run(const Cache& cache, const float* queries, std::size_t tokens, std::size_t first,
           std::size_t window, float* out, Pool& pool);

 private:
  float* partial(std::size_t token, std::size_t head, std::size_t span);
  void attend(const Cache& cache, const float* queries, std::size_t kv_head, std::size_t span);
  void merge(std::size_t token, std::size_t head, float* out);
  std::size_t begin(std::size_t token) const;  // the first position that `token` attends to

  Heads heads_;
  std::size_t spans_;            // of the whole capacity
  std::vector<float> partials_;  // [tokens, heads, spans, 2 + dim]: maximum, sum, weighted values
  std::size_t tokens_ = 0, first_ = 0, window_ = 0;  // of the current run
};

}  // namespace quantine
