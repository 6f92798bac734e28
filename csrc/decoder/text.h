// Texts that a decoder has seen, and which of their tokens go through the model together.
#pragma once

#include <cstddef>
#include <variant>
#include <vector>

#include "base/pool.h"
#include "decoder/attention.h"
#include "decoder/model.h"
#include "decoder/packed_cache.h"

namespace quantine {

using AnyCache = std::variant<Cache, PackedCache>;

// The tokens of a text so far: their number, and their keys and values in each block.
struct Text {
  Text(const Model& model, std::size_t capacity, Arithmetic arithmetic);

  std::vector<AnyCache> caches;
  std::size_t position = 0;
};

// Tokens of one text that follow each other, from `position` on: rows of a pass from `row` on.
struct Stretch {
  Text* text;
  std::size_t position, row, count;
};

// Rows that share one look at the weights.
struct Pass {
  std::vector<Stretch> stretches;

  std::size_t count() const { return stretches.back().row + stretches.back().count; }
  // Rows whose arithmetic may depend on how many they are.
  std::size_t together() const { return stretches.front().count; }
};

// The next `count` tokens of a text.
Pass appended(Text& text, std::size_t count);

// A token of each of these texts, which may be the same ones. Each row is a stretch of its own, so
// that it is computed as if it was alone.
Pass stepped(std::vector<Text>& texts, const std::size_t* which, std::size_t count);

// Puts the keys and values of a stretch, [count, kv_heads, dim] each, into a cache of its text.
void put(AnyCache& cache, const Heads& heads, const Stretch& stretch, const float* keys,
         const float* values, Pool& pool);

}  // namespace quantine
