// Fills the cache, cuts attention into spans of tokens for threads, and merges what they find.
#include "decoder/attention.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>

#include "decoder/layers.h"

namespace quantine {
namespace {

constexpr std::size_t kMany = 16;      // queries that are worth codes made floats for all of them
constexpr std::size_t kSmall = 65536;  // multiplications that are done before a thread wakes up
constexpr float kNone = -std::numeric_limits<float>::infinity();

std::size_t blocks_of(std::size_t count, std::size_t size) { return (count + size - 1) / size; }

std::size_t whole(std::size_t count, std::size_t size) { return blocks_of(count, size) * size; }

}  // namespace

Cache::Cache(Heads heads, std::size_t capacity, Arithmetic arithmetic)
    : heads_(heads), capacity_(whole(capacity, kKeyLanes)), width_(whole(heads.dim, kWide)) {
  const std::size_t tokens = heads.kv_heads * capacity_;
  const bool exact = arithmetic == Arithmetic::kExact;
  const std::size_t item = exact ? sizeof(float) : sizeof(std::int16_t);
  keys_ = zeros(tokens * heads.dim * item);
  values_ = zeros(tokens * width_ * item);
  if (exact) return;
  key_scales_ = zeros(tokens * sizeof(float));
  value_scales_ = zeros(tokens * sizeof(float));
}

void Cache::put(std::size_t position, const float* keys, const float* values) {
  std::vector<std::int16_t> key_codes(heads_.dim), value_codes(heads_.dim);
  for (std::size_t head = 0; head < heads_.kv_heads; ++head) {
    const float *key = keys + head * heads_.dim, *value = values + head * heads_.dim;
    if (is_exact()) {
      put_row(head, position, key, value);
      continue;
    }
    const std::size_t place = head * capacity_ + position;
    at<float>(key_scales_)[place] = round_row(key, heads_.dim, key_codes.data());
    at<float>(value_scales_)[place] = round_row(value, heads_.dim, value_codes.data());
    put_row(head, position, key_codes.data(), value_codes.data());
  }
}

template <typename T>
void Cache::put_row(std::size_t kv_head, std::size_t position, const T* keys, const T* values) {
  const std::size_t lane = position % kKeyLanes;
  T* column = at<T>(keys_) + (kv_head * capacity_ + position - lane) * heads_.dim + lane;
  for (std::size_t d = 0; d < heads_.dim; ++d) column[d * kKeyLanes] = keys[d];
  std::copy_n(values, heads_.dim, at<T>(values_) + (kv_head * capacity_ + position) * width_);
}

Attention::Attention(Heads heads, std::size_t capacity, std::size_t most_tokens)
    : heads_(heads),
      spans_(blocks_of(capacity, kSpan)),
      stride_(whole(heads.dim, kWide) + 2),
      partials_(most_tokens * heads.heads * spans_ * stride_) {}

void Attention::run(const Cache& cache, const float* queries, std::size_t tokens, std::size_t first,
                    const Scoring& scoring, float* out, Pool& pool) {
  tokens_ = tokens;
  first_ = first;
  scoring_ = &scoring;
  const std::size_t oldest = begin(0) / kSpan;
  const std::size_t tasks = (blocks_of(first + tokens, kSpan) - oldest) * heads_.kv_heads;
  const auto task = [&](std::size_t index) {
    const std::size_t kv_head = index % heads_.kv_heads, span = oldest + index / heads_.kv_heads;
    attend(cache, queries, kv_head, span);
  };
  const std::size_t work = tokens * heads_.heads * heads_.dim * (first + tokens - begin(0));
  if (work <= kSmall)
    for (std::size_t index = 0; index < tasks; ++index) task(index);
  else
    pool.run(tasks, std::ref(task));
  for (std::size_t token = 0; token < tokens; ++token)
    for (std::size_t head = 0; head < heads_.heads; ++head)
      merge(token, head, out + (token * heads_.heads + head) * heads_.dim);
}

std::size_t Attention::begin(std::size_t token) const {
  const std::size_t end = first_ + token + 1;
  return end > scoring_->window ? end - scoring_->window : 0;
}

float* Attention::partial(std::size_t token, std::size_t head, std::size_t span) {
  return partials_.data() + ((token * heads_.heads + head) * spans_ + span) * stride_;
}

// The tokens of a span as one head of keys and values has them.
template <typename T>
SpanOf<T> Attention::tokens_of(const Cache& cache, std::size_t kv_head, std::size_t start) const {
  SpanOf<T> tokens{cache.keys<T>(kv_head, start), cache.values<T>(kv_head, start), nullptr, nullptr,
                   heads_.dim, scoring_->cap};
  if (!cache.is_exact()) {
    tokens.key_scales = cache.key_scales(kv_head, start);
    tokens.value_scales = cache.value_scales(kv_head, start);
  }
  return tokens;
}

// All queries that share a head of keys and values.
void Attention::attend(const Cache& cache, const float* queries, std::size_t kv_head,
                       std::size_t span) {
  const std::size_t start = span * kSpan;
  if (cache.is_exact())
    return attend(tokens_of<float>(cache, kv_head, start), queries, kv_head, span);
  const auto codes = tokens_of<std::int16_t>(cache, kv_head, start);
  if (tokens_ * heads_.heads / heads_.kv_heads < kMany)
    return attend(codes, queries, kv_head, span);
  const std::size_t count = whole(std::min(kSpan, first_ + tokens_ - start), kKeyLanes);
  const std::size_t keys = count * heads_.dim, values = count * whole(heads_.dim, kWide);
  const std::unique_ptr<float[]> floats(new float[keys + values]);
  widen(codes.keys, keys, floats.get());
  widen(codes.values, values, floats.get() + keys);
  attend(SpanOf<float>{floats.get(), floats.get() + keys, codes.key_scales, codes.value_scales,
                       codes.dim, codes.cap},
         queries, kv_head, span);
}

// kQueries at a time.
template <typename T>
void Attention::attend(const SpanOf<T>& tokens, const float* queries, std::size_t kv_head,
                     std::size_t span) {
  const std::size_t group = heads_.heads / heads_.kv_heads, start = span * kSpan;
  const ScoreBias* bias = scoring_->bias.get();
  Query asked[kQueries];
  std::size_t count = 0;
  for (std::size_t index = 0; index < tokens_ * group; ++index) {
    const std::size_t token = index / group, head = kv_head * group + index % group;
    const std::size_t from = std::max(begin(token), start);
    const std::size_t to = std::min(first_ + token + 1, start + kSpan);
    if (from < to)
      asked[count++] = {queries + (token * heads_.heads + head) * heads_.dim, from - start,
                        to - start,
                        bias == nullptr ? nullptr : bias->of(head, heads_.heads) + start,
                        partial(token, head, span)};
    if (count == kQueries || index + 1 == tokens_ * group) {
      attend_span(tokens, asked, count);
      count = 0;
    }
  }
}

void Attention::merge(std::size_t token, std::size_t head, float* out) {
  const std::size_t from = begin(token) / kSpan, to = blocks_of(first_ + token + 1, kSpan);
  const float* best = partial(token, head, from) + stride_ - 2;  // and after it the sum
  float top = kNone, total = 0.0f;
  for (std::size_t span = from; span < to; ++span)
    top = std::max(top, best[(span - from) * stride_]);
  std::fill_n(out, heads_.dim, 0.0f);
  for (std::size_t span = from; span < to; ++span, best += stride_) {
    float* part = partial(token, head, span);
    const float weight = std::exp(best[0] - top);
    total += weight * best[1];
    scale(part, weight, heads_.dim);
    add(out, part, heads_.dim);
  }
  scale(out, 1.0f / total, heads_.dim);
}

}  // namespace quantine
