// Hands new keys and values, and queries, to the kernels of packed attention.
#include "decoder/packed_cache.h"

#include <algorithm>
#include <limits>

#include "bits/bits.h"

namespace quantine {
namespace {

constexpr std::size_t kBehind = 64;  // bytes that kernels may read after the last row

// [tokens, context], for queries at places first, first + 1, ... of the context.
void hide(std::size_t tokens, std::size_t context, std::size_t first, std::size_t window,
          std::vector<float>& mask) {
  mask.assign(tokens * context, 0.0f);
  for (std::size_t token = 0; token < tokens; ++token) {
    float* row = mask.data() + token * context;
    const std::size_t end = first + token + 1;
    std::fill(row + end, row + context, -std::numeric_limits<float>::infinity());
    if (end > window) std::fill_n(row, end - window, -std::numeric_limits<float>::infinity());
  }
}

}  // namespace

PackedCache::PackedCache(Heads heads, std::size_t capacity, const AttentionRounding& rounding)
    : heads_(heads),
      capacity_(capacity),
      rounding_(rounding),
      keys_(side_of(heads, capacity, rounding.key)),
      values_(side_of(heads, capacity, rounding.value)) {}

PackedCache::Side PackedCache::side_of(Heads heads, std::size_t capacity,
                                       const StateChannels& channels) {
  const std::size_t bytes = packed_bytes(heads.dim, channels.bits);
  return {channels, bytes, zeros(heads.kv_heads * capacity * bytes + kBehind)};
}

void PackedCache::put(std::size_t position, std::size_t tokens, const float* keys,
                      const float* values, Pool& pool) {
  put_side(keys_, position, tokens, keys, pool);
  put_side(values_, position, tokens, values, pool);
}

void PackedCache::put_side(Side& side, std::size_t position, std::size_t tokens,
                           const float* states, Pool& pool) const {
  const std::size_t width = heads_.kv_heads * heads_.dim;
  const FloatStates floats{states,     1,     heads_.kv_heads, tokens,
                           heads_.dim, 0,     heads_.dim,      width};
  pack_states(floats, side.channels.grid(),
              static_cast<std::uint8_t*>(side.codes.get()) + position * side.bytes, 0,
              capacity_ * side.bytes, side.bytes, pool);
}

void PackedCache::attend(const float* queries, std::size_t tokens, std::size_t first,
                         const Scoring& scoring, float* out, PackedScratch& scratch,
                         Pool& pool) const {
  const std::size_t window = scoring.window, from = first + 1 > window ? first + 1 - window : 0;
  const std::size_t context = first + tokens - from;
  scratch.queries.resize(heads_.heads * tokens * heads_.dim);
  scratch.probabilities.resize(heads_.heads * tokens * context);
  turn(queries, tokens, scratch.queries.data(), pool);
  PackedAttention call{1,
                       heads_.heads,
                       heads_.kv_heads,
                       tokens,
                       context,
                       heads_.dim,
                       states(keys_, from),
                       states(values_, from),
                       {nullptr, 0, 0, 0},
                       rounding_.scaling,
                       scoring.cap,
                       rounding_.softmax_bits,
                       rounding_.relative};
  if (tokens > 1) {
    hide(tokens, context, first - from, window, scratch.mask);
    call.mask = {scratch.mask.data(), 0, 0, context};
  }
  attend_packed(call, scratch.queries.data(), scratch.probabilities.data(), out, pool);
}

// Queries as attention wants them, rounded and [heads, tokens, dim].
void PackedCache::turn(const float* queries, std::size_t tokens, float* out, Pool& pool) const {
  const std::size_t dim = heads_.dim, width = heads_.heads * dim;
  if (rounding_.query) {
    const FloatStates floats{queries, 1, heads_.heads, tokens, dim, 0, dim, width};
    return round_states(floats, rounding_.query->grid(), out, pool);
  }
  for (std::size_t head = 0; head < heads_.heads; ++head)
    for (std::size_t token = 0; token < tokens; ++token)
      std::copy_n(queries + token * width + head * dim, dim, out + (head * tokens + token) * dim);
}

PackedStates PackedCache::states(const Side& side, std::size_t from) const {
  const auto* codes = static_cast<const std::uint8_t*>(side.codes.get()) + from * side.bytes;
  const std::size_t extent = (heads_.kv_heads * capacity_ - from) * side.bytes + kBehind;
  const StateGrid grid = side.channels.grid();
  return {codes,      0,         capacity_ * side.bytes, side.bytes, extent, grid.bits,
          grid.scale, grid.zero, heads_.dim,             nullptr,    nullptr, false};
}

}  // namespace quantine
