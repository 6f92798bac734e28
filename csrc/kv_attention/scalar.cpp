// The meaning of the kernels of packed attention in plain C++, for any processor.
#include "kv_attention/kernel.h"

namespace quantine {
namespace {

struct Scalar {
  static constexpr std::size_t kLanes = 8;
  static constexpr int kParts = 1;
  struct Float {
    float lane[kLanes];
  };
  struct Spreader {
    explicit Spreader(int code_bits) : bits(code_bits) {}
    int bits;
  };

  template <Width>
  static Float spread(const std::uint8_t* bytes, const Spreader& s) {
    std::uint64_t word = 0;  // eight codes are at most eight bytes
    for (int k = 0; k < 8; ++k) word |= static_cast<std::uint64_t>(bytes[k]) << (8 * k);
    const std::uint64_t mask = (1u << s.bits) - 1;
    Float codes;
    for (std::size_t r = 0; r < kLanes; ++r)
      codes.lane[r] = static_cast<float>(
          static_cast<std::int32_t>(word >> (static_cast<int>(r) * s.bits) & mask));
    return codes;
  }
  static Float set(float value) {
    Float a;
    for (float& lane : a.lane) lane = value;
    return a;
  }
  static Float load(const float* from) {
    Float a;
    std::memcpy(a.lane, from, sizeof a.lane);
    return a;
  }
  static void store(float* to, const Float& a) { std::memcpy(to, a.lane, sizeof a.lane); }
  static Float sub(const Float& a, const Float& b) {
    Float c;
    for (std::size_t r = 0; r < kLanes; ++r) c.lane[r] = a.lane[r] - b.lane[r];
    return c;
  }
  static Float fma(const Float& a, const Float& b, const Float& c) {
    Float d;
    for (std::size_t r = 0; r < kLanes; ++r) d.lane[r] = a.lane[r] * b.lane[r] + c.lane[r];
    return d;
  }
  // Lane i is the sum of rows[i].
  static Float fold(const Float* rows) {
    Float sums;
    for (std::size_t r = 0; r < kLanes; ++r) {
      const float* x = rows[r].lane;
      sums.lane[r] = ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
    }
    return sums;
  }
};

}  // namespace

const StateLevel& scalar_state_level() {
  static const StateLevel level = state_level_of<Scalar>("scalar");
  return level;
}

}  // namespace quantine
