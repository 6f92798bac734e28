// Attention of a few queries over the tokens of one span.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quantine {

constexpr std::size_t kKeyLanes = 64;  // tokens whose keys lie side by side
constexpr std::size_t kSpan = 128;     // tokens of one task: their keys and values stay in cache
constexpr std::size_t kWide = 16;      // values of a token are padded to a multiple of so many
constexpr std::size_t kQueries = 4;    // that meet the keys and values at once

// The keys and values of one head from the start of a span on; see Cache for their order.
template <typename T>
struct SpanOf {
  const T* keys;
  const T* values;
  const float* key_scales;  // [kSpan], of codes; null: they are values
  const float* value_scales;
  std::size_t dim;
  float cap;  // scores become cap * tanh(score / cap); 0: they stay as they are
};

// One head of one token, which attends to the tokens `begin` to `end` of the span, one at least.
struct Query {
  const float* x;  // [dim]
  std::size_t begin, end;
  const float* bias;  // [kSpan], added to scores once they are capped; null: nothing is
  // [dim rounded up to whole vectors + 2]: the values weighted by e^(score - largest), the largest
  // score, the sum of e^(score - largest).
  float* partial;
};

// Up to kQueries of them; memory is what takes time, so they share each look at keys and values.
void attend_span(const SpanOf<float>& tokens, const Query* queries, std::size_t count);
void attend_span(const SpanOf<std::int16_t>& tokens, const Query* queries, std::size_t count);

}  // namespace quantine
