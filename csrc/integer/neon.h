// Integer products for ARM processors of 64 bits: `Dot` multiplies by the instructions that a file is
// compiled for. Rounding and centring are the plain loops, which compilers vectorize.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "integer/level.h"

namespace quantine {
namespace {

constexpr std::size_t kOutputs = 16, kQuad = 4, kVector = 64;

#define QUANTINE_INLINE static inline __attribute__((always_inline))

// Sums of products of codes without a sign and of weights with one, for four outputs: the results of
// four inputs after another. `Count` is what else they need to know of the inputs.
struct WideDot {
  struct Count {};
  struct Sum {
    int32x4_t low, high;  // of two outputs each, whose sums are in neighbours
  };
  using Inputs = int16x8_t;
  struct Weight {
    int16x8_t low, high;
  };
  QUANTINE_INLINE Sum none() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
  QUANTINE_INLINE Inputs inputs(std::uint32_t four) {
    return vreinterpretq_s16_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))));
  }
  QUANTINE_INLINE Weight weight(int8x16_t w) {
    return {vmovl_s8(vget_low_s8(w)), vmovl_high_s8(w)};
  }
  QUANTINE_INLINE int32x4_t pairs(int32x4_t sum, int16x8_t w, Inputs x) {
    const int32x4_t first = vmull_s16(vget_low_s16(w), vget_low_s16(x));
    return vaddq_s32(sum, vpaddq_s32(first, vmull_high_s16(w, x)));
  }
  QUANTINE_INLINE Sum add(Sum sum, const Weight& w, Inputs x) {
    return {pairs(sum.low, w.low, x), pairs(sum.high, w.high, x)};
  }
  QUANTINE_INLINE Count no_count() { return {}; }
  QUANTINE_INLINE Count count(Count count, Inputs) { return count; }
  QUANTINE_INLINE int32x4_t whole(const Sum& sum, Count) { return vpaddq_s32(sum.low, sum.high); }
};

#if defined(__ARM_FEATURE_DOTPROD)
// Weights become larger by 128, so that neither has a sign: the sum of the inputs, times 128, is
// what results are too large by. Both wrap alike.
struct PlainDot {
  using Sum = uint32x4_t;
  using Count = uint32x4_t;  // the sum of the inputs in each lane
  using Inputs = uint8x16_t;
  using Weight = uint8x16_t;
  QUANTINE_INLINE Sum none() { return vdupq_n_u32(0); }
  QUANTINE_INLINE Inputs inputs(std::uint32_t four) {
    return vreinterpretq_u8_u32(vdupq_n_u32(four));
  }
  QUANTINE_INLINE Weight weight(int8x16_t w) {
    return veorq_u8(vreinterpretq_u8_s8(w), vdupq_n_u8(0x80));
  }
  QUANTINE_INLINE Sum add(Sum sum, Weight w, Inputs x) { return vdotq_u32(sum, w, x); }
  QUANTINE_INLINE Count no_count() { return vdupq_n_u32(0); }
  QUANTINE_INLINE Count count(Count count, Inputs x) { return vdotq_u32(count, x, vdupq_n_u8(1)); }
  QUANTINE_INLINE int32x4_t whole(Sum sum, Count count) {
    return vreinterpretq_s32_u32(vsubq_u32(sum, vshlq_n_u32(count, 7)));
  }
};
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8)
struct MixedDot {
  using Sum = int32x4_t;
  struct Count {};
  using Inputs = uint8x16_t;
  using Weight = int8x16_t;
  QUANTINE_INLINE Sum none() { return vdupq_n_s32(0); }
  QUANTINE_INLINE Inputs inputs(std::uint32_t four) {
    return vreinterpretq_u8_u32(vdupq_n_u32(four));
  }
  QUANTINE_INLINE Weight weight(int8x16_t w) { return w; }
  QUANTINE_INLINE Sum add(Sum sum, Weight w, Inputs x) { return vusdotq_s32(sum, x, w); }
  QUANTINE_INLINE Count no_count() { return {}; }
  QUANTINE_INLINE Count count(Count count, Inputs) { return count; }
  QUANTINE_INLINE int32x4_t whole(Sum sum, Count) { return sum; }
};
#endif

// `kRows` rows of activations meet `kTiles` tiles.
template <typename Dot, int kRows, int kTiles>
void multiply_rows(const Panel& panel, std::size_t tile, const Codes& a, std::size_t row,
                   float* results) {
  constexpr int kParts = 4 * kTiles;
  const std::size_t stride = a.stride;
  float32x4_t total[kRows][kParts];
  for (int part = 0; part < kParts; ++part)
    for (int r = 0; r < kRows; ++r)
      total[r][part] = vld1q_f32(panel.begin + tile * kOutputs + static_cast<std::size_t>(part) * 4);
  for (std::size_t group = 0; group < a.groups; ++group) {
    const Span& span = a.spans[group];
    const std::uint8_t* x = a.codes + row * stride + span.start;
    const std::int8_t* w = panel.codes + (tile * stride + span.start) * kOutputs;
    typename Dot::Sum sum[kRows][kParts];
    typename Dot::Count count[kRows];
    for (int r = 0; r < kRows; ++r) {
      count[r] = Dot::no_count();
      for (int part = 0; part < kParts; ++part) sum[r][part] = Dot::none();
    }
    for (std::size_t i = 0; i < span.padded; i += kQuad, w += kVector) {
      typename Dot::Inputs four[kRows];
      for (int r = 0; r < kRows; ++r) {
        std::uint32_t word;
        std::memcpy(&word, x + static_cast<std::size_t>(r) * stride + i, sizeof word);
        four[r] = Dot::inputs(word);
        count[r] = Dot::count(count[r], four[r]);
      }
      for (int part = 0; part < kParts; ++part) {
        const std::size_t at = static_cast<std::size_t>(part / 4) * stride * kOutputs;
        const auto weight = Dot::weight(vld1q_s8(w + at + part % 4 * 16));
        for (int r = 0; r < kRows; ++r) sum[r][part] = Dot::add(sum[r][part], weight, four[r]);
      }
    }
    for (int part = 0; part < kParts; ++part) {
      const std::size_t place = ((tile + static_cast<std::size_t>(part / 4)) * a.groups + group) *
                                    kOutputs + static_cast<std::size_t>(part % 4) * 4;
      const float32x4_t scale = vld1q_f32(panel.scales + place);
      for (int r = 0; r < kRows; ++r) {
        float32x4_t whole = vcvtq_f32_s32(Dot::whole(sum[r][part], count[r]));
        if (panel.rests != nullptr) {
          const float codes = a.sums[(row + static_cast<std::size_t>(r)) * a.groups + group];
          whole = vfmsq_f32(whole, vld1q_f32(panel.rests + place), vdupq_n_f32(codes));
        }
        total[r][part] = vfmaq_f32(total[r][part], whole, scale);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int part = 0; part < kParts; ++part)
      vst1q_f32(results + static_cast<std::size_t>(r) * 2 * kOutputs +
                    static_cast<std::size_t>(part) * 4,
                total[r][part]);
}

template <typename Dot, int kTiles>
void multiply_tiles(const Panel& panel, std::size_t tile, const Codes& a, std::size_t row,
                    std::size_t rows, float* results) {
  constexpr std::size_t kMost = 4 / kTiles;  // sums stay in registers
  for (; rows >= kMost; rows -= kMost, row += kMost, results += kMost * 2 * kOutputs)
    multiply_rows<Dot, kMost, kTiles>(panel, tile, a, row, results);
  for (; rows > 0; --rows, ++row, results += 2 * kOutputs)
    multiply_rows<Dot, 1, kTiles>(panel, tile, a, row, results);
}

template <typename Dot>
void multiply(const Panel& panel, std::size_t tile, bool two, const Codes& a, std::size_t row,
              std::size_t rows, float* results) {
  if (two) multiply_tiles<Dot, 2>(panel, tile, a, row, rows, results);
  else multiply_tiles<Dot, 1>(panel, tile, a, row, rows, results);
}

template <typename Dot>
IntegerLevel integer_level_of(const char* name) {
  const IntegerLevel& plain = integer_scalar();
  return {name, kQuad, kMostRows, plain.round, plain.centre, multiply<Dot>};
}

#undef QUANTINE_INLINE

}  // namespace
}  // namespace quantine
