// Vectors of 16 lanes for ARM processors of 64 bits; `Dot` multiplies codes with rounded activations
// by the instructions that a file is compiled for. See planes.h.
#pragma once

#include <arm_neon.h>

#include "matrix/kernel.h"

namespace quantine {
namespace {

#define QUANTINE_INLINE static inline __attribute__((always_inline))

struct NeonInt {
  uint32x4_t part[4];
};

// By products of 16 bits, which every processor has.
struct WideDot {
  struct Sum {
    int32x4_t low[4], high[4];  // of two lanes each, whose sums are in neighbours
  };
  QUANTINE_INLINE Sum none() {
    Sum found;
    for (int v = 0; v < 4; ++v) found.low[v] = found.high[v] = vdupq_n_s32(0);
    return found;
  }
  // Two codes of activations, as often as a vector has room.
  QUANTINE_INLINE int16x8_t two(const std::uint8_t* codes) {
    std::int32_t word;
    std::memcpy(&word, codes, sizeof word);
    return vreinterpretq_s16_s32(vdupq_n_s32(word));
  }
  QUANTINE_INLINE Sum add(Sum sum, const NeonInt& codes, const std::uint8_t* x) {
    const int16x8_t even = two(x), odd = two(x + 2 * sizeof(std::int16_t));
    for (int v = 0; v < 4; ++v) {
      const uint16x8_t pairs = vreinterpretq_u16_u32(codes.part[v]);
      const int16x8_t low = vreinterpretq_s16_u16(vandq_u16(pairs, vdupq_n_u16(0xff)));
      const int16x8_t high = vreinterpretq_s16_u16(vshrq_n_u16(pairs, 8));
      sum.low[v] = vmlal_s16(sum.low[v], vget_low_s16(low), vget_low_s16(even));
      sum.low[v] = vmlal_s16(sum.low[v], vget_low_s16(high), vget_low_s16(odd));
      sum.high[v] = vmlal_high_s16(sum.high[v], low, even);
      sum.high[v] = vmlal_high_s16(sum.high[v], high, odd);
    }
    return sum;
  }
  QUANTINE_INLINE NeonInt whole(const Sum& sum) {
    NeonInt found;
    for (int v = 0; v < 4; ++v)
      found.part[v] = vreinterpretq_u32_s32(vpaddq_s32(sum.low[v], sum.high[v]));
    return found;
  }
  // Chunk by chunk: the even codes, then the odd ones.
  QUANTINE_INLINE void write(std::uint8_t* out, int16x8_t codes) {
    static constexpr std::uint8_t kOrder[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
    vst1q_u8(out, vqtbl1q_u8(vreinterpretq_u8_s16(codes), vld1q_u8(kOrder)));
  }
};

template <typename Dot>
struct Neon {
  static constexpr int kBatch = 4;  // rows of activations that share decoded codes
  static constexpr std::size_t kMany = 0;  // see Avx2
  using Int = NeonInt;
  struct Float {
    float32x4_t part[4];
  };
  using Sum = typename Dot::Sum;

  template <typename F>
  QUANTINE_INLINE Float each(F&& f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  template <typename F>
  QUANTINE_INLINE Int each_int(F&& f) {
    return {{f(0), f(1), f(2), f(3)}};
  }

  QUANTINE_INLINE Int load(const std::uint8_t* bytes) {
    return each_int([&](int v) { return vreinterpretq_u32_u8(vld1q_u8(bytes + 16 * v)); });
  }
  QUANTINE_INLINE Int nothing() {
    return each_int([](int) { return vdupq_n_u32(0); });
  }
  template <int kDown>
  QUANTINE_INLINE uint32x4_t down(uint32x4_t a) {
    if constexpr (kDown > 0) return vshrq_n_u32(a, kDown);
    else if constexpr (kDown < 0) return vshlq_n_u32(a, -kDown);
    else return a;
  }
  template <int kDown, std::uint32_t kMask>
  QUANTINE_INLINE Int field(const Int& a) {
    return each_int([&](int v) { return vandq_u32(down<kDown>(a.part[v]), vdupq_n_u32(kMask)); });
  }
  QUANTINE_INLINE Int join(const Int& a, const Int& b) {
    return each_int([&](int v) { return vorrq_u32(a.part[v], b.part[v]); });
  }
  QUANTINE_INLINE Sum no_sum() { return Dot::none(); }
  QUANTINE_INLINE Sum dot(const Sum& acc, const Int& codes, const std::uint8_t* x) {
    return Dot::add(acc, codes, x);
  }
  QUANTINE_INLINE Int whole(const Sum& a) { return Dot::whole(a); }
  QUANTINE_INLINE Int plus(const Int& a, const Int& b) {
    return each_int([&](int v) { return vaddq_u32(a.part[v], b.part[v]); });
  }
  template <int k>
  QUANTINE_INLINE Float byte(const Int& codes) {
    return to_float(field<8 * k, 0xffu>(codes));
  }
  QUANTINE_INLINE Float to_float(const Int& a) {
    return each([&](int v) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a.part[v])); });
  }

  QUANTINE_INLINE Float set(float value) {
    return each([&](int) { return vdupq_n_f32(value); });
  }
  QUANTINE_INLINE Float halves(const void* values) {
    const auto* bytes = static_cast<const std::uint8_t*>(values);
    return each([&](int v) {
      return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(bytes + 8 * v)));
    });
  }
  QUANTINE_INLINE Float floats(const void* values) {
    const auto* bytes = static_cast<const std::uint8_t*>(values);
    return each([&](int v) { return vreinterpretq_f32_u8(vld1q_u8(bytes + 16 * v)); });
  }

  // The two bytes that hold each of 16 codes, and its place in them.
  struct Spreader {
    uint8x16_t bytes[4];
    int32x4_t shifts[4];
    uint32x4_t mask;
  };
  static inline Spreader spreader(int bits) {
    Spreader found;
    for (std::uint32_t v = 0; v < 4; ++v) {
      std::uint32_t places[4];
      std::int32_t downs[4];
      for (std::uint32_t r = 0; r < 4; ++r) {
        const std::uint32_t bit = (4 * v + r) * static_cast<std::uint32_t>(bits), next = bit / 8 + 1;
        places[r] = 0xffff0000u | next << 8 | bit / 8;  // beyond the last byte: zero
        downs[r] = -static_cast<std::int32_t>(bit % 8);
      }
      found.bytes[v] = vreinterpretq_u8_u32(vld1q_u32(places));
      found.shifts[v] = vld1q_s32(downs);
    }
    found.mask = vdupq_n_u32((1u << bits) - 1);
    return found;
  }
  // 16 codes without gaps: at most 16 bytes.
  QUANTINE_INLINE Float spread(const std::uint8_t* bytes, const Spreader& s) {
    const uint8x16_t all = vld1q_u8(bytes);
    return each([&](int v) {
      const uint32x4_t pairs = vreinterpretq_u32_u8(vqtbl1q_u8(all, s.bytes[v]));
      return vcvtq_f32_u32(vandq_u32(vshlq_u32(pairs, s.shifts[v]), s.mask));
    });
  }
  QUANTINE_INLINE Float magnitude(const Float& a) {
    return each([&](int v) { return vabsq_f32(a.part[v]); });
  }
  QUANTINE_INLINE float32x4_t larger(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
  }
  // Of numbers that are not negative, by their bits: NaN is larger than infinity.
  QUANTINE_INLINE Float larger(const Float& a, const Float& b) {
    return each([&](int v) { return larger(a.part[v], b.part[v]); });
  }
  QUANTINE_INLINE float largest(const Float& a) {
    const float32x4_t four = larger(larger(a.part[0], a.part[1]), larger(a.part[2], a.part[3]));
    const std::uint32_t bits = vmaxvq_u32(vreinterpretq_u32_f32(four));
    float found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
  }
  QUANTINE_INLINE float sum(const Float& a) {
    return vaddvq_f32(
        vaddq_f32(vaddq_f32(a.part[0], a.part[1]), vaddq_f32(a.part[2], a.part[3])));
  }
  // Whole numbers within 16 bit, to even on ties, of some times 16 inputs, which they become.
  template <int kParts>
  QUANTINE_INLINE void round(std::uint8_t* out, Float (&a)[kParts]) {
    for (Float& one : a) {
      int32x4_t codes[4];
      for (int v = 0; v < 4; ++v) codes[v] = vcvtnq_s32_f32(one.part[v]);
      Dot::write(out, vmovn_high_s32(vmovn_s32(codes[0]), codes[1]));
      Dot::write(out + 16, vmovn_high_s32(vmovn_s32(codes[2]), codes[3]));
      out += 32;
      one = each([&](int v) { return vcvtq_f32_s32(codes[v]); });
    }
  }
  QUANTINE_INLINE Float add(const Float& a, const Float& b) {
    return each([&](int v) { return vaddq_f32(a.part[v], b.part[v]); });
  }
  QUANTINE_INLINE Float sub(const Float& a, const Float& b) {
    return each([&](int v) { return vsubq_f32(a.part[v], b.part[v]); });
  }
  QUANTINE_INLINE Float mul(const Float& a, const Float& b) {
    return each([&](int v) { return vmulq_f32(a.part[v], b.part[v]); });
  }
  QUANTINE_INLINE Float fma(const Float& a, const Float& b, const Float& c) {
    return each([&](int v) { return vfmaq_f32(c.part[v], a.part[v], b.part[v]); });
  }
  QUANTINE_INLINE Float fnma(const Float& a, const Float& b, const Float& c) {
    return each([&](int v) { return vfmsq_f32(c.part[v], a.part[v], b.part[v]); });
  }
  QUANTINE_INLINE void store(float* out, const Float& a) {
    for (int v = 0; v < 4; ++v) vst1q_f32(out + 4 * v, a.part[v]);
  }
  template <typename T>
  static void turn(const Strip& strip, std::size_t count, T* out, std::size_t stride) {
    turn_slowly(strip, count, out, stride);
  }
  // out[e] = x[columns[e]] * value[e].
  static inline void products(const std::uint16_t* columns, const std::uint16_t* halves,
                              const float* floats, std::size_t count, const float* x, float* out) {
    for (std::size_t e = 0; e < count; ++e)
      out[e] = x[columns[e]] * (halves ? half_to_float(halves[e]) : floats[e]);
  }
};

#if defined(__ARM_FEATURE_DOTPROD)
// Activations come apart into low bytes without a sign and high bytes with one: each chunk is four
// low bytes, then four high ones.
template <typename High>
struct ByteDot {
  using Sum = typename High::Sum;
  QUANTINE_INLINE Sum none() {
    Sum found;
    High::clear(found);
    for (int v = 0; v < 4; ++v) found.low[v] = vdupq_n_u32(0);
    return found;
  }
  QUANTINE_INLINE Sum add(Sum sum, const NeonInt& codes, const std::uint8_t* x) {
    const uint8x8_t both = vld1_u8(x);
    for (int v = 0; v < 4; ++v)
      sum.low[v] = vdotq_lane_u32(sum.low[v], vreinterpretq_u8_u32(codes.part[v]), both, 0);
    High::add(sum, codes, vreinterpret_s8_u8(both));
    return sum;
  }
  QUANTINE_INLINE NeonInt whole(const Sum& sum) {
    NeonInt found;
    for (int v = 0; v < 4; ++v)
      found.part[v] = vaddq_u32(
          vshlq_n_u32(vreinterpretq_u32_s32(High::whole(sum, v)), 8), sum.low[v]);
    return found;
  }
  QUANTINE_INLINE void write(std::uint8_t* out, int16x8_t codes) {
    const uint32x2_t low = vreinterpret_u32_u8(vmovn_u16(vreinterpretq_u16_s16(codes)));
    const uint32x2_t high = vreinterpret_u32_s8(vshrn_n_s16(codes, 8));
    vst1_u8(out, vreinterpret_u8_u32(vzip1_u32(low, high)));
    vst1_u8(out + 8, vreinterpret_u8_u32(vzip2_u32(low, high)));
  }
};

// Codes become less by 128, so that both bytes have a sign; what that takes off is alike in all
// lanes.
struct SignedHigh {
  struct Sum {
    uint32x4_t low[4];
    int32x4_t high[4], all;
  };
  QUANTINE_INLINE void clear(Sum& sum) {
    for (auto& high : sum.high) high = vdupq_n_s32(0);
    sum.all = vdupq_n_s32(0);
  }
  QUANTINE_INLINE void add(Sum& sum, const NeonInt& codes, int8x8_t x) {
    for (int v = 0; v < 4; ++v) {
      const uint8x16_t less = veorq_u8(vreinterpretq_u8_u32(codes.part[v]), vdupq_n_u8(0x80));
      sum.high[v] = vdotq_lane_s32(sum.high[v], vreinterpretq_s8_u8(less), x, 1);
    }
    sum.all = vdotq_lane_s32(sum.all, vdupq_n_s8(1), x, 1);
  }
  QUANTINE_INLINE int32x4_t whole(const Sum& sum, int v) {
    return vaddq_s32(sum.high[v], vshlq_n_s32(sum.all, 7));
  }
};
#endif

#if defined(__ARM_FEATURE_MATMUL_INT8)
struct MixedHigh {
  struct Sum {
    uint32x4_t low[4];
    int32x4_t high[4];
  };
  QUANTINE_INLINE void clear(Sum& sum) {
    for (auto& high : sum.high) high = vdupq_n_s32(0);
  }
  QUANTINE_INLINE void add(Sum& sum, const NeonInt& codes, int8x8_t x) {
    for (int v = 0; v < 4; ++v)
      sum.high[v] = vusdotq_lane_s32(sum.high[v], vreinterpretq_u8_u32(codes.part[v]), x, 1);
  }
  QUANTINE_INLINE int32x4_t whole(const Sum& sum, int v) { return sum.high[v]; }
};
#endif

#undef QUANTINE_INLINE

}  // namespace
}  // namespace quantine
