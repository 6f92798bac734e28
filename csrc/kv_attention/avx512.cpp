// Compiled for AVX-512; called only where the processor has it.
#include <immintrin.h>

#include "kv_attention/kernel.h"

namespace quantine {
namespace {

struct Avx512 {
  static constexpr std::size_t kLanes = 16;
  static constexpr int kParts = 4;
  using Float = __m512;
#define QUANTINE_INLINE static inline __attribute__((always_inline))

  // The two bytes that hold each of 16 codes, and its place in them. Codes of at most 4 bits are
  // looked up in `table` by 4 bits, of which those above a code's do not count.
  struct Spreader {
    explicit Spreader(int bits) {
      alignas(64) std::uint32_t places[kLanes], downs[kLanes];
      alignas(64) float codes[kLanes];
      for (std::uint32_t r = 0; r < kLanes; ++r) {
        const std::uint32_t bit = r * static_cast<std::uint32_t>(bits), next = bit / 8 + 1;
        places[r] = 0x80800000u | ((next < 16 ? next : 0x80u) << 8) | (bit / 8);
        downs[r] = bit % 8;
        codes[r] = static_cast<float>(r & ((1u << bits) - 1));
      }
      bytes = _mm512_load_si512(places);
      shifts = _mm512_load_si512(downs);
      mask = _mm512_set1_epi32((1 << bits) - 1);
      table = _mm512_load_ps(codes);
    }
    __m512i bytes, shifts, mask;
    Float table;
  };

  template <Width kKind>
  QUANTINE_INLINE Float spread(const std::uint8_t* bytes, const Spreader& s) {
    const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    if constexpr (kKind == Width::kWhole)
      return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(loaded));
    const __m512i all = _mm512_broadcast_i32x4(loaded);
    const __m512i places = _mm512_srlv_epi32(_mm512_shuffle_epi8(all, s.bytes), s.shifts);
    if constexpr (kKind == Width::kSmall) return _mm512_permutexvar_ps(places, s.table);
    else return _mm512_cvtepi32_ps(_mm512_and_si512(places, s.mask));
  }
  QUANTINE_INLINE Float set(float value) { return _mm512_set1_ps(value); }
  QUANTINE_INLINE Float load(const float* from) { return _mm512_loadu_ps(from); }
  QUANTINE_INLINE void store(float* to, Float a) { _mm512_storeu_ps(to, a); }
  QUANTINE_INLINE Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  QUANTINE_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  // Of each four lanes, sums of pairs of `a` and `b` in turn.
  QUANTINE_INLINE Float pairs(Float a, Float b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  // Of each four lanes, the sums of four rows.
  QUANTINE_INLINE Float fours(const Float* rows) {
    const __m512d low = _mm512_castps_pd(pairs(rows[0], rows[1]));
    const __m512d high = _mm512_castps_pd(pairs(rows[2], rows[3]));
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
  QUANTINE_INLINE Float quarters(Float a, Float b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  // Lane i is the sum of rows[i].
  QUANTINE_INLINE Float fold(const Float* rows) {
    return quarters(quarters(fours(rows), fours(rows + 4)),
                    quarters(fours(rows + 8), fours(rows + 12)));
  }
};

}  // namespace

const StateLevel& avx512_state_level() {
  static const StateLevel level = state_level_of<Avx512>("avx512");
  return level;
}

}  // namespace quantine
