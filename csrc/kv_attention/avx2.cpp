// Compiled for AVX2 and FMA; called only where the processor has them.
#include <immintrin.h>

#include "kv_attention/kernel.h"

namespace quantine {
namespace {

struct Avx2 {
  static constexpr std::size_t kLanes = 8;
  static constexpr int kParts = 2;
  using Float = __m256;
#define QUANTINE_INLINE static inline __attribute__((always_inline))

  // The two bytes that hold each of 8 codes, and its place in them; its place in 32 bits that hold
  // them all, if they do.
  struct Spreader {
    explicit Spreader(int bits) {
      alignas(32) std::uint32_t places[kLanes], downs[kLanes], alone[kLanes];
      for (std::uint32_t r = 0; r < kLanes; ++r) {
        const std::uint32_t bit = r * static_cast<std::uint32_t>(bits), next = bit / 8 + 1;
        places[r] = 0x80800000u | ((next < 8 ? next : 0x80u) << 8) | (bit / 8);
        downs[r] = bit % 8;
        alone[r] = bit;
      }
      bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(places));
      shifts = _mm256_load_si256(reinterpret_cast<const __m256i*>(downs));
      small_shifts = _mm256_load_si256(reinterpret_cast<const __m256i*>(alone));
      mask = _mm256_set1_epi32((1 << bits) - 1);
    }
    __m256i bytes, shifts, small_shifts, mask;
  };

  template <Width kKind>
  QUANTINE_INLINE Float spread(const std::uint8_t* bytes, const Spreader& s) {
    if constexpr (kKind == Width::kWhole)
      return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
    if constexpr (kKind == Width::kSmall) {
      std::int32_t all;
      std::memcpy(&all, bytes, sizeof all);
      const __m256i codes = _mm256_srlv_epi32(_mm256_set1_epi32(all), s.small_shifts);
      return _mm256_cvtepi32_ps(_mm256_and_si256(codes, s.mask));
    }
    long long word;
    std::memcpy(&word, bytes, sizeof word);
    const __m256i pairs = _mm256_shuffle_epi8(_mm256_set1_epi64x(word), s.bytes);
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(pairs, s.shifts), s.mask));
  }
  QUANTINE_INLINE Float set(float value) { return _mm256_set1_ps(value); }
  QUANTINE_INLINE Float load(const float* from) { return _mm256_loadu_ps(from); }
  QUANTINE_INLINE void store(float* to, Float a) { _mm256_storeu_ps(to, a); }
  QUANTINE_INLINE Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  QUANTINE_INLINE Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  // Lane i is the sum of rows[i].
  QUANTINE_INLINE Float fold(const Float* rows) {
    const Float low =
        _mm256_hadd_ps(_mm256_hadd_ps(rows[0], rows[1]), _mm256_hadd_ps(rows[2], rows[3]));
    const Float high =
        _mm256_hadd_ps(_mm256_hadd_ps(rows[4], rows[5]), _mm256_hadd_ps(rows[6], rows[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                         _mm256_permute2f128_ps(low, high, 0x31));
  }
};

}  // namespace

const StateLevel& avx2_state_level() {
  static const StateLevel level = state_level_of<Avx2>("avx2");
  return level;
}

}  // namespace quantine
