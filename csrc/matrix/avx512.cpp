// Compiled for AVX-512 with VNNI; called only where the processor has it.

#include <immintrin.h>

#include "matrix/kernel.h"

namespace quantine {
namespace {

struct Avx512 {
  static constexpr int kBatch = 8;  // rows of activations that share decoded codes
  static constexpr std::size_t kMany = 0;  // see Avx2
  using Int = __m512i;
  using Float = __m512;
  struct Sum {
    Int high, low;  // of products with the two parts of activations
  };
#define QUANTINE_INLINE static inline __attribute__((always_inline))

  QUANTINE_INLINE Int load(const std::uint8_t* bytes) { return _mm512_load_si512(bytes); }
  QUANTINE_INLINE Int nothing() { return _mm512_setzero_si512(); }
  template <int kDown, std::uint32_t kMask>
  QUANTINE_INLINE Int field(Int a) {
    const Int mask = _mm512_set1_epi32(static_cast<int>(kMask));
    if constexpr (kDown > 0) a = _mm512_srli_epi32(a, kDown);
    if constexpr (kDown < 0) a = _mm512_slli_epi32(a, -kDown);
    return _mm512_and_si512(a, mask);
  }
  QUANTINE_INLINE Int join(Int a, Int b) { return _mm512_or_si512(a, b); }
  QUANTINE_INLINE Int four(const std::uint8_t* codes) {
    std::int32_t word;
    std::memcpy(&word, codes, sizeof word);
    return _mm512_set1_epi32(word);
  }
  QUANTINE_INLINE Sum no_sum() { return {nothing(), nothing()}; }
  QUANTINE_INLINE Sum dot(Sum acc, Int codes, const std::uint8_t* x) {
    return {_mm512_dpbusd_epi32(acc.high, codes, four(x)),
            _mm512_dpbusd_epi32(acc.low, codes, four(x + kChunk))};
  }
  QUANTINE_INLINE Int plus(Int a, Int b) { return _mm512_add_epi32(a, b); }
  QUANTINE_INLINE Int whole(Sum a) {
    return _mm512_add_epi32(_mm512_slli_epi32(a.high, 8), a.low);
  }
  template <int k>
  QUANTINE_INLINE Float byte(Int codes) {
    if constexpr (k == 3) return _mm512_cvtepi32_ps(_mm512_srli_epi32(codes, 24));
    else return _mm512_cvtepi32_ps(field<8 * k, 0xffu>(codes));
  }
  QUANTINE_INLINE Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }

  QUANTINE_INLINE Float set(float value) { return _mm512_set1_ps(value); }
  QUANTINE_INLINE Float halves(const void* values) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(values)));
  }
  QUANTINE_INLINE Float floats(const void* values) { return _mm512_loadu_ps(values); }

  // How 16 codes of some bits without gaps come apart: the two bytes that hold each, and its place
  // in them.
  struct Spreader {
    Int bytes, shifts, mask;
  };
  static inline Spreader spreader(int bits) {
    alignas(64) std::uint32_t bytes[kTile], shifts[kTile];
    for (std::uint32_t r = 0; r < kTile; ++r) {
      const std::uint32_t bit = r * static_cast<std::uint32_t>(bits);
      bytes[r] = 0x80800000u | (std::min(bit / 8 + 1, 15u) << 8) | std::min(bit / 8, 15u);
      shifts[r] = bit % 8;
    }
    return {_mm512_load_si512(bytes), _mm512_load_si512(shifts),
            _mm512_set1_epi32((1 << std::min(bits, 8)) - 1)};
  }
  QUANTINE_INLINE Float spread(const std::uint8_t* bytes, const Spreader& s) {
    const Int all =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const Int pairs = _mm512_shuffle_epi8(all, s.bytes);
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(pairs, s.shifts), s.mask));
  }
  QUANTINE_INLINE Float magnitude(Float a) { return _mm512_abs_ps(a); }
  // Of numbers that are not negative, by their bits: NaN is larger than infinity.
  QUANTINE_INLINE Float larger(Float a, Float b) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  QUANTINE_INLINE float largest(Float a) {
    return _mm_cvtss_f32(_mm_castsi128_ps(
        _mm_cvtsi32_si128(_mm512_reduce_max_epi32(_mm512_castps_si512(a)))));
  }
  QUANTINE_INLINE float sum(Float a) { return _mm512_reduce_add_ps(a); }
  // Whole numbers within 16 bit, to even on ties, of some times 16 inputs, which they become. They
  // are stored chunk by chunk: four high parts, then four low ones.
  template <int kParts>
  QUANTINE_INLINE void round(std::uint8_t* out, Float (&a)[kParts]) {
    for (int part = 0; part < kParts; part += 2) {
      const bool two = part + 1 < kParts;
      const Int first = _mm512_cvtps_epi32(a[part]);
      const Int second = two ? _mm512_cvtps_epi32(a[part + two]) : nothing();
      const Int codes = _mm512_packs_epi32(first, second);
      // The low part has a sign, which the high part makes up for: it is the second byte of this.
      const Int up = _mm512_add_epi16(codes, _mm512_set1_epi16(128));
      const Int both = _mm512_mask_mov_epi8(up, 0x5555555555555555u, codes);
      const Int order = _mm512_broadcast_i32x4(
          _mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14));
      const Int turns = _mm512_shuffle_epi8(both, order);  // chunks of both by turns
      const Int chunks =
          _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), turns);
      if (two) _mm512_storeu_si512(out, chunks);
      else _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(chunks));
      out += 64;
      a[part] = _mm512_cvtepi32_ps(first);
      if (two) a[part + two] = _mm512_cvtepi32_ps(second);
    }
  }
  QUANTINE_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  QUANTINE_INLINE Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  QUANTINE_INLINE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  QUANTINE_INLINE Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  QUANTINE_INLINE Float fnma(Float a, Float b, Float c) { return _mm512_fnmadd_ps(a, b, c); }
  QUANTINE_INLINE void store(float* out, Float a) { _mm512_storeu_ps(out, a); }
  // 16 x 16 lanes, in place.
  static inline void transpose(Int* rows) {
    Int a[kTile];
    for (std::size_t i = 0; i < kTile; i += 2) {
      a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
      a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (std::size_t i = 0; i < kTile; i += 4)
      for (std::size_t j = 0; j < 2; ++j) {
        rows[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
        rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
      }
    // The four parts of row i + j are now parts j, j + 4, j + 8 and j + 12 of columns i to i + 3.
    for (std::size_t j = 0; j < 4; ++j) {
      const Int low = _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0x88);
      const Int high = _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0x88);
      const Int low_odd = _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0xdd);
      const Int high_odd = _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0xdd);
      a[j] = _mm512_shuffle_i32x4(low, high, 0x88);
      a[j + 8] = _mm512_shuffle_i32x4(low, high, 0xdd);
      a[j + 4] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
      a[j + 12] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
    for (std::size_t i = 0; i < kTile; ++i) rows[i] = a[i];
  }
  static inline void turn(const Strip& strip, std::size_t count, float* out, std::size_t stride) {
    if (count != kStrip) return turn_slowly(strip, count, out, stride);
    for (std::size_t part = 0; part < kStrip; part += kTile) {
      Int rows[kTile];
      for (std::size_t c = 0; c < kTile; ++c) rows[c] = _mm512_load_si512(strip.columns[part + c]);
      transpose(rows);
      for (std::size_t r = 0; r < kTile; ++r)
        _mm512_storeu_si512(out + r * stride + part, rows[r]);
    }
  }
  // Rounded to bfloat16, to even on ties, in the high half. Weights are finite: NaN needs no care.
  QUANTINE_INLINE Int high_half(const float* values) {
    const Int bits = _mm512_load_si512(values);
    const Int odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
  static inline void turn(const Strip& strip, std::size_t count, std::uint16_t* out,
                          std::size_t stride) {
    if (count != kStrip) return turn_slowly(strip, count, out, stride);
    Int rows[kTile];  // pairs of columns
    for (std::size_t c = 0; c < kTile; ++c) {
      const Int first = _mm512_srli_epi32(high_half(strip.columns[2 * c]), 16);
      const Int second = high_half(strip.columns[2 * c + 1]);
      rows[c] = _mm512_mask_blend_epi16(0xaaaaaaaau, first, second);
    }
    transpose(rows);
    for (std::size_t r = 0; r < kTile; ++r) _mm512_storeu_si512(out + r * stride, rows[r]);
  }
  // out[e] = x[columns[e]] * value[e]; writes whole vectors.
  static inline void products(const std::uint16_t* columns, const std::uint16_t* halves,
                              const float* floats, std::size_t count, const float* x, float* out) {
    for (std::size_t e = 0; e < count; e += 16) {
      const __mmask16 some =
          static_cast<__mmask16>(count - e >= 16 ? 0xffffu : (1u << (count - e)) - 1);
      const Int at = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, columns + e));
      const Float value = halves ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, halves + e))
                                 : _mm512_maskz_loadu_ps(some, floats + e);
      const Float met = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, at, x, 4);
      _mm512_storeu_ps(out + e, _mm512_mul_ps(met, value));
    }
  }
#undef QUANTINE_INLINE
};

}  // namespace

const Level& avx512_level() {
  static const Level level = level_of<Avx512>("avx512");
  return level;
}

}  // namespace quantine
