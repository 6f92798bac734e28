// For ARM processors of 64 bits, all of which have NEON.
#include <arm_neon.h>

#include "kv_attention/kernel.h"

namespace quantine {
namespace {

struct Neon {
  static constexpr std::size_t kLanes = 8;
  static constexpr int kParts = 2;
  struct Float {
    float32x4_t low, high;
  };
#define QUANTINE_INLINE static inline __attribute__((always_inline))

  // The two bytes that hold each of 8 codes, and its place in them.
  struct Spreader {
    explicit Spreader(int bits) {
      std::uint16_t places[kLanes];
      std::int16_t downs[kLanes];
      for (std::uint32_t r = 0; r < kLanes; ++r) {
        const std::uint32_t bit = r * static_cast<std::uint32_t>(bits), next = bit / 8 + 1;
        places[r] = static_cast<std::uint16_t>((next < 8 ? next : 0xffu) << 8 | bit / 8);
        downs[r] = static_cast<std::int16_t>(-static_cast<std::int32_t>(bit % 8));
      }
      bytes = vreinterpretq_u8_u16(vld1q_u16(places));
      shifts = vld1q_s16(downs);
      mask = vdupq_n_u16(static_cast<std::uint16_t>((1 << bits) - 1));
    }
    uint8x16_t bytes;
    int16x8_t shifts;
    uint16x8_t mask;
  };

  QUANTINE_INLINE Float widen(uint16x8_t codes) {
    return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(codes))), vcvtq_f32_u32(vmovl_high_u16(codes))};
  }
  template <Width kKind>
  QUANTINE_INLINE Float spread(const std::uint8_t* bytes, const Spreader& s) {
    const uint8x8_t word = vld1_u8(bytes);
    if constexpr (kKind == Width::kWhole) return widen(vmovl_u8(word));
    const uint8x16_t pairs = vqtbl1q_u8(vcombine_u8(word, word), s.bytes);
    return widen(vandq_u16(vshlq_u16(vreinterpretq_u16_u8(pairs), s.shifts), s.mask));
  }
  QUANTINE_INLINE Float set(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
  QUANTINE_INLINE Float load(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
  QUANTINE_INLINE void store(float* to, Float a) {
    vst1q_f32(to, a.low);
    vst1q_f32(to + 4, a.high);
  }
  QUANTINE_INLINE Float sub(Float a, Float b) {
    return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)};
  }
  QUANTINE_INLINE Float fma(Float a, Float b, Float c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  QUANTINE_INLINE float32x4_t fold_four(const Float* rows) {
    float32x4_t half[4];
    for (int i = 0; i < 4; ++i) half[i] = vaddq_f32(rows[i].low, rows[i].high);
    return vpaddq_f32(vpaddq_f32(half[0], half[1]), vpaddq_f32(half[2], half[3]));
  }
  // Lane i is the sum of rows[i].
  QUANTINE_INLINE Float fold(const Float* rows) { return {fold_four(rows), fold_four(rows + 4)}; }
#undef QUANTINE_INLINE
};

}  // namespace

const StateLevel& neon_state_level() {
  static const StateLevel level = state_level_of<Neon>("neon");
  return level;
}

}  // namespace quantine
