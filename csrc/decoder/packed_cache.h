// The cache of a block that rounds keys and values to static grids: codes, as attention reads them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "base/pool.h"
#include "decoder/attention.h"
#include "decoder/memory.h"
#include "kv_attention/kv_attention.h"

namespace quantine {

// The numbers of a StateGrid.
struct StateChannels {
  int bits;
  std::vector<float> scale, zero;  // [heads, dim]
  std::vector<float> feedback;     // [heads, dim, dim], or empty

  StateGrid grid() const {
    return {bits, scale.data(), zero.data(), feedback.empty() ? nullptr : feedback.data(), nullptr};
  }
};

// How attention of a block rounds what it computes with; see PackedAttention.
struct AttentionRounding {
  StateChannels key, value;
  std::optional<StateChannels> query;
  float scaling;
  int softmax_bits;
  bool relative;
};

// What attention over packed caches needs while it runs; blocks share it.
struct PackedScratch {
  std::vector<float> queries, probabilities, mask;
};

// Keys and values of one decoder block for up to `capacity` tokens: rows of bit streams,
// [kv_heads, capacity, bytes] each.
class PackedCache {
 public:
  // `rounding` outlives the cache.
  PackedCache(Heads heads, std::size_t capacity, const AttentionRounding& rounding);
  // Rounds and puts the keys and values, [tokens, kv_heads, dim] each, from `position` on.
  void put(std::size_t position, std::size_t tokens, const float* keys, const float* values,
           Pool& pool);
  // What attention reads of a token.
  std::size_t token_bytes() const { return heads_.kv_heads * (keys_.bytes + values_.bytes); }
  // As Attention::run, but queries are not scaled, and nothing is added to scores.
  void attend(const float* queries, std::size_t tokens, std::size_t first, const Scoring& scoring,
              float* out, PackedScratch& scratch, Pool& pool) const;

 private:
  struct Side {
    const StateChannels& channels;
    std::size_t bytes;  // of a row
    Memory codes;
  };
  static Side side_of(Heads heads, std::size_t capacity, const StateChannels& channels);
  void put_side(Side& side, std::size_t position, std::size_t tokens, const float* states,
                Pool& pool) const;
  PackedStates states(const Side& side, std::size_t from) const;
  void turn(const float* queries, std::size_t tokens, float* out, Pool& pool) const;

  Heads heads_;
  std::size_t capacity_;
  const AttentionRounding& rounding_;
  Side keys_, values_;
};

}  // namespace quantine
