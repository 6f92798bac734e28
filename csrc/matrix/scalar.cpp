// The meaning of the kernels in plain C++, for processors without the instructions of the others.

#include "matrix/kernel.h"

namespace quantine {
namespace {

struct Scalar {
  static constexpr int kBatch = 1;  // rows of activations that share decoded codes
  static constexpr std::size_t kMany = 0;  // see Avx2
  struct Int {
    std::uint32_t lane[kTile];
  };
  struct Float {
    float lane[kTile];
  };
  using Sum = Int;

  template <typename F>
  static Float each(F&& f) {
    Float found;
    for (std::size_t r = 0; r < kTile; ++r) found.lane[r] = f(r);
    return found;
  }
  template <typename F>
  static Int each_int(F&& f) {
    Int found;
    for (std::size_t r = 0; r < kTile; ++r) found.lane[r] = f(r);
    return found;
  }

  static Int load(const std::uint8_t* bytes) {
    Int found;
    std::memcpy(found.lane, bytes, sizeof found.lane);
    return found;
  }
  static Int nothing() { return Int{}; }
  // Bits of every lane moved down by `kDown` (up, if negative), where `kMask` is set.
  template <int kDown, std::uint32_t kMask>
  static Int field(const Int& a) {
    return each_int([&](std::size_t r) {
      if constexpr (kDown >= 0) return (a.lane[r] >> kDown) & kMask;
      else return (a.lane[r] << -kDown) & kMask;
    });
  }
  static Int join(const Int& a, const Int& b) {
    return each_int([&](std::size_t r) { return a.lane[r] | b.lane[r]; });
  }
  static Sum no_sum() { return Sum{}; }
  // Adds the sum of products of four unsigned bytes of each lane with four codes of activations.
  static Sum dot(const Sum& acc, const Int& codes, const std::uint8_t* x) {
    std::int16_t four[kChunk];
    std::memcpy(four, x, sizeof four);
    return each_int([&](std::size_t r) {
      std::int32_t sum = static_cast<std::int32_t>(acc.lane[r]);
      for (std::size_t k = 0; k < kChunk; ++k)
        sum += static_cast<std::int32_t>((codes.lane[r] >> (8 * k)) & 0xffu) * four[k];
      return static_cast<std::uint32_t>(sum);
    });
  }
  static Int plus(const Int& a, const Int& b) {
    return each_int([&](std::size_t r) { return a.lane[r] + b.lane[r]; });
  }
  static const Int& whole(const Sum& a) { return a; }
  template <int k>
  static Float byte(const Int& codes) {
    return each(
        [&](std::size_t r) { return static_cast<float>((codes.lane[r] >> (8 * k)) & 0xffu); });
  }
  static Float to_float(const Int& a) {
    return each(
        [&](std::size_t r) { return static_cast<float>(static_cast<std::int32_t>(a.lane[r])); });
  }

  static Float set(float value) {
    return each([&](std::size_t) { return value; });
  }
  static Float halves(const void* values) {
    return each([&](std::size_t r) {
      std::uint16_t value;
      std::memcpy(&value, static_cast<const std::uint16_t*>(values) + r, 2);
      return half_to_float(value);
    });
  }
  static Float floats(const void* values) {
    Float found;
    std::memcpy(found.lane, values, sizeof found.lane);
    return found;
  }

  using Spreader = int;
  static Spreader spreader(int bits) { return bits; }
  // 16 codes of `bits` without gaps.
  static Float spread(const std::uint8_t* bytes, int bits) {
    return each([&](std::size_t r) {
      const std::size_t bit = r * static_cast<std::size_t>(bits);
      std::uint16_t word;
      std::memcpy(&word, bytes + bit / 8, 2);
      return static_cast<float>((word >> (bit % 8)) & ((1 << bits) - 1));
    });
  }
  static Float magnitude(const Float& a) {
    return each([&](std::size_t r) { return std::fabs(a.lane[r]); });
  }
  // Of numbers that are not negative: NaN is larger than infinity.
  static Float larger(const Float& a, const Float& b) {
    return each([&](std::size_t r) {
      return a.lane[r] >= b.lane[r] || a.lane[r] != a.lane[r] ? a.lane[r] : b.lane[r];
    });
  }
  static float largest(const Float& a) {
    float found = 0.0f;
    for (const float lane : a.lane) found = found >= lane || found != found ? found : lane;
    return found;
  }
  static float sum(const Float& a) {
    float found = 0.0f;
    for (const float lane : a.lane) found += lane;
    return found;
  }
  // Whole numbers within 16 bit, to even on ties, of some times 16 inputs, which they become.
  template <int kParts>
  static void round(std::uint8_t* out, Float (&a)[kParts]) {
    for (Float& one : a)
      for (float& lane : one.lane) {
        lane = std::nearbyint(lane);
        const auto code = static_cast<std::int16_t>(lane);
        std::memcpy(out, &code, sizeof code);
        out += sizeof code;
      }
  }
  static Float add(const Float& a, const Float& b) {
    return each([&](std::size_t r) { return a.lane[r] + b.lane[r]; });
  }
  static Float sub(const Float& a, const Float& b) {
    return each([&](std::size_t r) { return a.lane[r] - b.lane[r]; });
  }
  static Float mul(const Float& a, const Float& b) {
    return each([&](std::size_t r) { return a.lane[r] * b.lane[r]; });
  }
  static Float fma(const Float& a, const Float& b, const Float& c) {
    return each([&](std::size_t r) { return a.lane[r] * b.lane[r] + c.lane[r]; });
  }
  static Float fnma(const Float& a, const Float& b, const Float& c) {
    return each([&](std::size_t r) { return c.lane[r] - a.lane[r] * b.lane[r]; });
  }
  static void store(float* out, const Float& a) { std::memcpy(out, a.lane, sizeof a.lane); }
  template <typename T>
  static void turn(const Strip& strip, std::size_t count, T* out, std::size_t stride) {
    turn_slowly(strip, count, out, stride);
  }
  static void products(const std::uint16_t* columns, const std::uint16_t* halves,
                       const float* floats, std::size_t count, const float* x, float* out) {
    for (std::size_t e = 0; e < count; ++e)
      out[e] = x[columns[e]] * (halves ? half_to_float(halves[e]) : floats[e]);
  }
};

}  // namespace

const Level& scalar_level() {
  static const Level level = level_of<Scalar>("scalar");
  return level;
}

}  // namespace quantine
