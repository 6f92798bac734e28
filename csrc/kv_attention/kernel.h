// The loops of attention over packed codes, for any vectors V. Included once per instruction set.
#pragma once

#include <cstring>

#include "kv_attention/level.h"

namespace quantine {
namespace {

// What makes codes easier to take apart.
enum class Width { kSmall, kAny, kWhole };  // at most 4 bits, others, 8 bits

template <typename V, Width kKind, int kCount>
void score_some(const StateRows& rows, const float* queries, const float* offsets, float* scores,
                std::size_t stride) {
  using Float = typename V::Float;
  constexpr std::size_t kLanes = V::kLanes;
  const typename V::Spreader spreader(rows.bits);
  const std::size_t step = kLanes * static_cast<std::size_t>(rows.bits) / 8;
  for (std::size_t first = 0; first < rows.tokens; first += kLanes) {
    Float sums[kCount][kLanes];
    for (std::size_t i = 0; i < kLanes; ++i) {
      const std::size_t token = first + i < rows.tokens ? first + i : rows.tokens - 1;
      const std::uint8_t* codes = rows.codes + token * rows.stride;
      Float acc[kCount];
      for (int q = 0; q < kCount; ++q) acc[q] = V::set(0.0f);
      for (std::size_t d = 0; d < rows.width; d += kLanes, codes += step) {
        const Float decoded = V::template spread<kKind>(codes, spreader);
        for (int q = 0; q < kCount; ++q)
          acc[q] = V::fma(decoded, V::load(queries + static_cast<std::size_t>(q) * rows.width + d),
                          acc[q]);
      }
      for (int q = 0; q < kCount; ++q) sums[q][i] = acc[q];
    }
    const std::size_t count = rows.tokens - first < kLanes ? rows.tokens - first : kLanes;
    for (int q = 0; q < kCount; ++q) {
      float folded[kLanes];
      V::store(folded, V::sub(V::fold(sums[q]), V::set(offsets[q])));
      std::memcpy(scores + static_cast<std::size_t>(q) * stride + first, folded,
                  count * sizeof(float));
    }
  }
}

// kParts vectors from channel `first` on.
template <typename V, Width kKind, int kCount, int kParts>
void mix_part(const StateRows& rows, const float* weights, std::size_t stride, std::size_t first,
              float* sums) {
  using Float = typename V::Float;
  constexpr std::size_t kLanes = V::kLanes;
  const typename V::Spreader spreader(rows.bits);
  const auto bits = static_cast<std::size_t>(rows.bits);
  const std::uint8_t* codes = rows.codes + first * bits / 8;
  Float acc[kCount][kParts];
  for (int q = 0; q < kCount; ++q)
    for (int part = 0; part < kParts; ++part) acc[q][part] = V::set(0.0f);
  for (std::size_t token = 0; token < rows.tokens; ++token, codes += rows.stride) {
    Float decoded[kParts];
    for (int part = 0; part < kParts; ++part)
      decoded[part] = V::template spread<kKind>(
          codes + static_cast<std::size_t>(part) * kLanes * bits / 8, spreader);
    for (int q = 0; q < kCount; ++q) {
      const Float weight = V::set(weights[static_cast<std::size_t>(q) * stride + token]);
      for (int part = 0; part < kParts; ++part)
        acc[q][part] = V::fma(decoded[part], weight, acc[q][part]);
    }
  }
  for (int q = 0; q < kCount; ++q)
    for (int part = 0; part < kParts; ++part)
      V::store(sums + static_cast<std::size_t>(q) * rows.width + first +
                   static_cast<std::size_t>(part) * kLanes,
               acc[q][part]);
}

template <typename V, Width kKind, int kCount>
void mix_some(const StateRows& rows, const float* weights, std::size_t stride, float* sums) {
  constexpr std::size_t kWhole = V::kParts * V::kLanes;
  std::size_t first = 0;
  for (; first + kWhole <= rows.width; first += kWhole)
    mix_part<V, kKind, kCount, V::kParts>(rows, weights, stride, first, sums);
  for (; first < rows.width; first += V::kLanes)
    mix_part<V, kKind, kCount, 1>(rows, weights, stride, first, sums);
}

template <typename V, int kCount>
struct Several {
  static void score(const StateRows& rows, const float* queries, const float* offsets,
                    float* scores, std::size_t stride) {
    const auto loop = rows.bits <= 4   ? score_some<V, Width::kSmall, kCount>
                      : rows.bits == 8 ? score_some<V, Width::kWhole, kCount>
                                       : score_some<V, Width::kAny, kCount>;
    loop(rows, queries, offsets, scores, stride);
  }
  static void mix(const StateRows& rows, const float* weights, std::size_t stride, float* sums) {
    const auto loop = rows.bits <= 4   ? mix_some<V, Width::kSmall, kCount>
                      : rows.bits == 8 ? mix_some<V, Width::kWhole, kCount>
                                       : mix_some<V, Width::kAny, kCount>;
    loop(rows, weights, stride, sums);
  }
};

template <typename V>
void score(const StateRows& rows, const float* queries, const float* offsets, std::size_t count,
           float* scores, std::size_t stride) {
  static constexpr decltype(&Several<V, 1>::score) kLoops[kStateQueries] = {
      Several<V, 1>::score, Several<V, 2>::score, Several<V, 3>::score, Several<V, 4>::score};
  kLoops[count - 1](rows, queries, offsets, scores, stride);
}

template <typename V>
void mix(const StateRows& rows, const float* weights, std::size_t stride, std::size_t count,
         float* sums) {
  static constexpr decltype(&Several<V, 1>::mix) kLoops[kStateQueries] = {
      Several<V, 1>::mix, Several<V, 2>::mix, Several<V, 3>::mix, Several<V, 4>::mix};
  kLoops[count - 1](rows, weights, stride, sums);
}

template <typename V>
StateLevel state_level_of(const char* name) {
  return {name, score<V>, mix<V>};
}

}  // namespace
}  // namespace quantine
