// The loops over the keys and values of a span: scores, their exponentials, and mixtures of values.
// This file alone is compiled with contraction: products are rounded with what they are added to,
// where the processor can.
#include "decoder/attention_span.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "base/vector_math.h"

namespace quantine {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// Vectors of so many floats: as many as a register holds, as compilers keep wider ones in memory.
template <std::size_t kFloats>
struct Vector;
#define QUANTINE_VECTOR(kFloats)                                                                \
  template <>                                                                                   \
  struct Vector<kFloats> {                                                                      \
    typedef float Float __attribute__((vector_size(kFloats * sizeof(float))));                  \
    typedef std::int32_t Whole __attribute__((vector_size(kFloats * sizeof(std::int32_t))));    \
    typedef std::int16_t Short __attribute__((vector_size(kFloats * sizeof(std::int16_t))));    \
    static constexpr std::size_t kWidth = kFloats;                                              \
                                                                                                \
    static QUANTINE_INLINE void read(const float* from, Float& to) {                            \
      std::memcpy(&to, from, sizeof to);                                                        \
    }                                                                                           \
    static QUANTINE_INLINE void read(const std::int16_t* from, Float& to) {                     \
      Short codes;                                                                              \
      std::memcpy(&codes, from, sizeof codes);                                                  \
      to = __builtin_convertvector(__builtin_convertvector(codes, Whole), Float);               \
    }                                                                                           \
  }
QUANTINE_VECTOR(4);
QUANTINE_VECTOR(8);
QUANTINE_VECTOR(16);
#undef QUANTINE_VECTOR

// Vectors that are summed at once for so many queries: their sums have to fit 16 registers.
template <typename V>
constexpr int parts_of(int count) {
  constexpr int kMost = static_cast<int>(kKeyLanes / V::kWidth);
  const int wanted = count > 2 ? 2 : 8 / count;
  return wanted < kMost ? wanted : kMost;
}

// sums[q][part] += x[q] * what is read, for kCount queries and kParts parts.
template <typename V, int kCount, int kParts, typename T>
QUANTINE_INLINE void add_products(const float* x, const T* from,
                                  typename V::Float (&sums)[kCount][kParts]) {
#pragma GCC unroll 8
  for (int part = 0; part < kParts; ++part) {
    typename V::Float once;
    V::read(from + part * static_cast<int>(V::kWidth), once);
#pragma GCC unroll 4
    for (int q = 0; q < kCount; ++q) sums[q][part] += x[q] * once;
  }
}

// scores[q][kKeyLanes] = keys[dim, kKeyLanes] . query q
template <typename V, int kCount, typename T>
QUANTINE_INLINE void score(const SpanOf<T>& tokens, const Query* queries, std::size_t first,
                           float (*scores)[kSpan]) {
  constexpr int kParts = parts_of<V>(kCount);
  const T* keys = tokens.keys + first * tokens.dim;
  for (std::size_t lane = 0; lane < kKeyLanes; lane += kParts * V::kWidth) {
    typename V::Float sums[kCount][kParts] = {};
    for (std::size_t d = 0; d < tokens.dim; ++d) {
      float x[kCount];
      for (int q = 0; q < kCount; ++q) x[q] = queries[q].x[d];
      add_products<V, kCount, kParts>(x, keys + d * kKeyLanes + lane, sums);
    }
    for (int q = 0; q < kCount; ++q)
      std::memcpy(scores[q] + first + lane, sums[q], sizeof sums[q]);
  }
  if (tokens.key_scales == nullptr) return;
  for (int q = 0; q < kCount; ++q)
    for (std::size_t r = first; r < first + kKeyLanes; ++r) scores[q][r] *= tokens.key_scales[r];
}

// Caps the scores of what the query looks at, and adds their biases.
QUANTINE_INLINE void adjust(const Query& query, float cap, float* scores) {
  if (cap > 0.0f)
    for (std::size_t j = query.begin; j < query.end; ++j) scores[j] = capped(scores[j], cap);
  if (query.bias != nullptr)
    for (std::size_t j = query.begin; j < query.end; ++j) scores[j] += query.bias[j];
}

QUANTINE_INLINE float largest(const float* scores) {
  float best[kKeyLanes];
  for (std::size_t r = 0; r < kKeyLanes; ++r) best[r] = scores[r];
  for (std::size_t j = kKeyLanes; j < kSpan; j += kKeyLanes)
    for (std::size_t r = 0; r < kKeyLanes; ++r)
      best[r] = scores[j + r] > best[r] ? scores[j + r] : best[r];
  for (std::size_t half = kKeyLanes / 2; half > 0; half /= 2)
    for (std::size_t r = 0; r < half; ++r)
      best[r] = best[r + half] > best[r] ? best[r + half] : best[r];
  return best[0];
}

// Scores become e^(score - largest), 0 where the query does not look; the largest and the sum go
// to `found`.
QUANTINE_INLINE void exponentiate(const Query& query, float* scores, float* found) {
  for (std::size_t j = 0; j < query.begin; ++j) scores[j] = kNone;
  for (std::size_t j = query.end; j < kSpan; ++j) scores[j] = kNone;
  const float top = largest(scores);
  for (std::size_t j = 0; j < kSpan; ++j) scores[j] = exponential(scores[j] - top);
  found[0] = top;
  found[1] = sum_of(kSpan, [scores](std::size_t j) { return scores[j]; });
}

// partials[q][kParts vectors] = sum of weights[q][token] * values[token, ...].
template <typename V, int kCount, int kParts, typename T>
QUANTINE_INLINE void mix(const float (*weights)[kSpan], const T* values, std::size_t stride,
                         std::size_t begin, std::size_t end, const Query* queries,
                         std::size_t first) {
  typename V::Float sums[kCount][kParts] = {};
  for (std::size_t j = begin; j < end; ++j) {
    float x[kCount];
    for (int q = 0; q < kCount; ++q) x[q] = weights[q][j];
    add_products<V, kCount, kParts>(x, values + j * stride + first, sums);
  }
  for (int q = 0; q < kCount; ++q) std::memcpy(queries[q].partial + first, sums[q], sizeof sums[q]);
}

template <typename V, int kCount, typename T>
QUANTINE_INLINE void attend_some(const SpanOf<T>& tokens, const Query* queries) {
  std::size_t begin = kSpan, end = 0;
  for (int q = 0; q < kCount; ++q) {
    begin = queries[q].begin < begin ? queries[q].begin : begin;
    end = queries[q].end > end ? queries[q].end : end;
  }
  const std::size_t width = (tokens.dim + kWide - 1) / kWide * kWide;
  float scores[kCount][kSpan];
  for (std::size_t j = begin / kKeyLanes * kKeyLanes; j < end; j += kKeyLanes)
    score<V, kCount>(tokens, queries, j, scores);
  for (int q = 0; q < kCount; ++q) {
    adjust(queries[q], tokens.cap, scores[q]);
    exponentiate(queries[q], scores[q], queries[q].partial + width);
    if (tokens.value_scales == nullptr) continue;
    for (std::size_t j = queries[q].begin; j < queries[q].end; ++j)
      scores[q][j] *= tokens.value_scales[j];
  }
  constexpr int kParts = parts_of<V>(kCount);
  std::size_t d = 0;
  for (; d + kParts * V::kWidth <= width; d += kParts * V::kWidth)
    mix<V, kCount, kParts>(scores, tokens.values, width, begin, end, queries, d);
  for (; d < width; d += V::kWidth)
    mix<V, kCount, 1>(scores, tokens.values, width, begin, end, queries, d);
}

template <std::size_t kFloats, typename T>
QUANTINE_INLINE void attend_any(const SpanOf<T>& tokens, const Query* queries, std::size_t count) {
  using V = Vector<kFloats>;
  switch (count) {
    case 1:
      return attend_some<V, 1>(tokens, queries);
    case 2:
      return attend_some<V, 2>(tokens, queries);
    case 3:
      return attend_some<V, 3>(tokens, queries);
    case 4:
      return attend_some<V, 4>(tokens, queries);
  }
}

// One function for each width of registers; the processor has the program take the right one, if it
// is called where all of them are seen.
#define QUANTINE_ATTEND_BEST(T, kFloats)                                                        \
  void attend_best(const SpanOf<T>& tokens, const Query* queries, std::size_t count) {          \
    attend_any<kFloats>(tokens, queries, count);                                                \
  }
#if defined(QUANTINE_HAS_CLONES)
__attribute__((target("avx512f"))) QUANTINE_ATTEND_BEST(float, 16)
__attribute__((target("avx512f"))) QUANTINE_ATTEND_BEST(std::int16_t, 16)
__attribute__((target("avx2,fma"))) QUANTINE_ATTEND_BEST(float, 8)
__attribute__((target("avx2,fma"))) QUANTINE_ATTEND_BEST(std::int16_t, 8)
__attribute__((target("default"))) QUANTINE_ATTEND_BEST(float, 4)
__attribute__((target("default"))) QUANTINE_ATTEND_BEST(std::int16_t, 4)
#else
QUANTINE_ATTEND_BEST(float, 4)
QUANTINE_ATTEND_BEST(std::int16_t, 4)
#endif
#undef QUANTINE_ATTEND_BEST

}  // namespace

void attend_span(const SpanOf<float>& tokens, const Query* queries, std::size_t count) {
  attend_best(tokens, queries, count);
}

void attend_span(const SpanOf<std::int16_t>& tokens, const Query* queries, std::size_t count) {
  attend_best(tokens, queries, count);
}

}  // namespace quantine
