#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

#include "vector_math.h"
#include "layers.h"

namespace quantine {
namespace {

constexpr std::size_t kKeyLanes = 64;  // tokens whose keys lie side by side
constexpr std::size_t kSpan = 256;     // tokens of one task: their keys and values stay in cache
constexpr std::size_t kSmall = 65536;  // multiplications that are done before a thread wakes up
constexpr std::size_t kQueries = 8;    // heads of one token that are attended to together
constexpr float kNone = -std::numeric_limits<float>::infinity();

std::size_t blocks_of(std::size_t count, std::size_t size) { return (count + size - 1) / size; }

// scores[lanes] = keys[dim, lanes] . query[dim]
QUANTINE_INLINE void score(const float* query, const float* keys, std::size_t dim, float* scores) {
  float lanes[kKeyLanes] = {};
  for (std::size_t d = 0; d < dim; ++d)
    for (std::size_t r = 0; r < kKeyLanes; ++r) lanes[r] += query[d] * keys[d * kKeyLanes + r];
  for (std::size_t r = 0; r < kKeyLanes; ++r) scores[r] = lanes[r];
}

QUANTINE_INLINE float largest(const float* scores, std::size_t lanes) {
  float best[kKeyLanes];
  for (std::size_t r = 0; r < kKeyLanes; ++r) best[r] = scores[r];
  for (std::size_t j = kKeyLanes; j < lanes; j += kKeyLanes)
    for (std::size_t r = 0; r < kKeyLanes; ++r)
      best[r] = scores[j + r] > best[r] ? scores[j + r] : best[r];
  for (std::size_t half = kKeyLanes / 2; half > 0; half /= 2)
    for (std::size_t r = 0; r < half; ++r) best[r] = best[r + half] > best[r] ? best[r + half] : best[r];
  return best[0];
}

// Scores become e^(score - largest), 0 outside of begin to end; partial gets the largest and the sum.
QUANTINE_INLINE void exponentiate(float* scores, std::size_t begin, std::size_t end,
                                  std::size_t lanes, float* partial) {
  for (std::size_t j = 0; j < begin; ++j) scores[j] = kNone;
  for (std::size_t j = end; j < lanes; ++j) scores[j] = kNone;
  const float top = largest(scores, lanes);
  for (std::size_t j = 0; j < lanes; ++j) scores[j] = exponential(scores[j] - top);
  partial[0] = top;
  partial[1] = sum_of(lanes, [scores](std::size_t j) { return scores[j]; });
}

// out[dim] += weights[count] . values[count, dim], four tokens for each pass over out.
QUANTINE_INLINE void mix(const float* weights, const float* values, std::size_t count,
                         std::size_t dim, float* out) {
  std::size_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const float* row = values + j * dim;
    const float a = weights[j], b = weights[j + 1], c = weights[j + 2], e = weights[j + 3];
    for (std::size_t d = 0; d < dim; ++d)
      out[d] += (a * row[d] + b * row[dim + d]) + (c * row[2 * dim + d] + e * row[3 * dim + d]);
  }
  for (; j < count; ++j)
    for (std::size_t d = 0; d < dim; ++d) out[d] += weights[j] * values[j * dim + d];
}

// Queries [n, dim] over the tokens begin to end (at most kSpan) of a span; memory is what takes
// time, so each block of keys or values serves all n while it is near. For each query a partial,
// `stride` floats apart: the largest score, the sum of e^(score - largest), and the values [dim]
// weighted by those.
QUANTINE_CLONES
void attend_span(const float* queries, std::size_t n, const float* keys, const float* values,
                 std::size_t begin, std::size_t end, std::size_t dim, float* partials,
                 std::size_t stride) {
  float scores[kQueries][kSpan];
  const std::size_t from = begin / kKeyLanes * kKeyLanes;
  const std::size_t lanes = (end - from + kKeyLanes - 1) / kKeyLanes * kKeyLanes;
  for (std::size_t j = 0; j < lanes; j += kKeyLanes)
    for (std::size_t q = 0; q < n; ++q)
      score(queries + q * dim, keys + (from + j) * dim, dim, scores[q] + j);
  for (std::size_t q = 0; q < n; ++q) {
    exponentiate(scores[q], begin - from, end - from, lanes, partials + q * stride);
    for (std::size_t d = 0; d < dim; ++d) partials[q * stride + 2 + d] = 0.0f;
  }
  for (std::size_t j = begin; j < end; j += kKeyLanes) {
    const std::size_t count = end - j < kKeyLanes ? end - j : kKeyLanes;
    for (std::size_t q = 0; q < n; ++q)
      mix(scores[q] + (j - from), values + j * dim, count, dim, partials + q * stride + 2);
  }
}

}  // namespace

Cache::Cache(Heads heads, std::size_t capacity)
    : heads_(heads),
      capacity_(blocks_of(capacity, kKeyLanes) * kKeyLanes),
      keys_(zeros(heads.kv_heads * capacity_ * heads.dim)),
      values_(zeros(heads.kv_heads * capacity_ * heads.dim)) {}

// The system maps zero pages when they are first used: what is never reached costs nothing.
Cache::Memory Cache::zeros(std::size_t count) {
  Memory memory(static_cast<float*>(std::calloc(count, sizeof(float))));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void Cache::put(std::size_t position, const float* keys, const float* values) {
  const std::size_t lane = position % kKeyLanes;
  for (std::size_t head = 0; head < heads_.kv_heads; ++head) {
    const std::size_t place = (head * capacity_ + position - lane) * heads_.dim + lane;
    for (std::size_t d = 0; d < heads_.dim; ++d)
      keys_[place + d * kKeyLanes] = keys[head * heads_.dim + d];
    std::copy_n(values + head * heads_.dim, heads_.dim,
                values_.get() + (head * capacity_ + position) * heads_.dim);
  }
}

const float* Cache::keys(std::size_t kv_head, std::size_t position) const {
  return keys_.get() + (kv_head * capacity_ + position) * heads_.dim;
}

const float* Cache::values(std::size_t kv_head, std::size_t position) const {
  return values_.get() + (kv_head * capacity_ + position) * heads_.dim;
}

Attention::Attention(Heads heads, std::size_t capacity, std::size_t most_tokens)
    : heads_(heads),
      spans_(blocks_of(capacity, kSpan)),
      partials_(most_tokens * heads.heads * spans_ * (2 + heads.dim)) {}

void Attention::run(const Cache& cache, const float* queries, std::size_t tokens, std::size_t first,
                    std::size_t window, float* out, Pool& pool) {
  tokens_ = tokens;
  first_ = first;
  window_ = window;
  const std::size_t oldest = begin(0) / kSpan;
  const std::size_t tasks = (blocks_of(first + tokens, kSpan) - oldest) * heads_.kv_heads;
  const auto task = [&](std::size_t index) {
    attend(cache, queries, index % heads_.kv_heads, oldest + index / heads_.kv_heads);
  };
  const std::size_t work = tokens * heads_.heads * heads_.dim * (first + tokens - begin(0));
  if (work <= kSmall)
    for (std::size_t index = 0; index < tasks; ++index) task(index);
  else
    pool.run(tasks, task);
  for (std::size_t token = 0; token < tokens; ++token)
    for (std::size_t head = 0; head < heads_.heads; ++head)
      merge(token, head, out + (token * heads_.heads + head) * heads_.dim);
}

std::size_t Attention::begin(std::size_t token) const {
  const std::size_t end = first_ + token + 1;
  return end > window_ ? end - window_ : 0;
}

float* Attention::partial(std::size_t token, std::size_t head, std::size_t span) {
  return partials_.data() + ((token * heads_.heads + head) * spans_ + span) * (2 + heads_.dim);
}

void Attention::attend(const Cache& cache, const float* queries, std::size_t kv_head,
                       std::size_t span) {
  const std::size_t group = heads_.heads / heads_.kv_heads, start = span * kSpan;
  const float* keys = cache.keys(kv_head, start);
  const float* values = cache.values(kv_head, start);
  for (std::size_t token = 0; token < tokens_; ++token) {
    const std::size_t from = std::max(begin(token), start);
    const std::size_t to = std::min(first_ + token + 1, start + kSpan);
    if (from >= to) continue;
    for (std::size_t done = 0; done < group; done += kQueries) {
      const std::size_t head = kv_head * group + done;
      attend_span(queries + (token * heads_.heads + head) * heads_.dim,
                  std::min(kQueries, group - done), keys, values, from - start, to - start,
                  heads_.dim, partial(token, head, span), spans_ * (2 + heads_.dim));
    }
  }
}

void Attention::merge(std::size_t token, std::size_t head, float* out) {
  const std::size_t from = begin(token) / kSpan, to = blocks_of(first_ + token + 1, kSpan);
  float top = kNone, total = 0.0f;
  for (std::size_t span = from; span < to; ++span) top = std::max(top, partial(token, head, span)[0]);
  std::fill_n(out, heads_.dim, 0.0f);
  for (std::size_t span = from; span < to; ++span) {
    float* part = partial(token, head, span);
    const float weight = std::exp(part[0] - top);
    total += weight * part[1];
    scale(part + 2, weight, heads_.dim);
    add(out, part + 2, heads_.dim);
  }
  scale(out, 1.0f / total, heads_.dim);
}

}  // namespace quantine
