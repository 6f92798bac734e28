// Gives rows their places in texts.
#include "decoder/text.h"

#include <utility>

namespace quantine {

Text::Text(const Model& model, std::size_t capacity, Arithmetic arithmetic) {
  for (const DecoderBlock& block : model.blocks) {
    if (block.states)
      caches.emplace_back(std::in_place_type<PackedCache>, model.heads, capacity, *block.states);
    else
      caches.emplace_back(std::in_place_type<Cache>, model.heads, capacity, arithmetic);
  }
}

Pass appended(Text& text, std::size_t count) { return {{{&text, text.position, 0, count}}}; }

Pass stepped(std::vector<Text>& texts, const std::size_t* which, std::size_t count) {
  Pass pass;
  pass.stretches.reserve(count);
  for (std::size_t row = 0; row < count; ++row) {
    Text& text = texts[which[row]];
    std::size_t position = text.position;
    for (const Stretch& before : pass.stretches) position += before.text == &text;
    pass.stretches.push_back({&text, position, row, 1});
  }
  return pass;
}

void put(AnyCache& cache, const Heads& heads, const Stretch& stretch, const float* keys,
         const float* values, Pool& pool) {
  if (auto* packed = std::get_if<PackedCache>(&cache))
    return packed->put(stretch.position, stretch.count, keys, values, pool);
  const std::size_t width = heads.kv_heads * heads.dim;
  for (std::size_t row = 0; row < stretch.count; ++row)
    std::get<Cache>(cache).put(stretch.position + row, keys + row * width, values + row * width);
}

}  // namespace quantine
