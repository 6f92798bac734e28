// Compiled for AVX2 with FMA; called only where the processor has it.

#include <immintrin.h>

#include "matrix/kernel.h"

namespace quantine {
namespace {

struct Avx2 {
  static constexpr int kBatch = 4;  // rows of activations that share decoded codes
  // So many rows are worth codes that are taken out once for all of them; 0: none are.
  static constexpr std::size_t kMany = 12;
  struct Int {
    __m256i low, high;
  };
  struct Float {
    __m256 low, high;
  };
  using Sum = Int;
#define QUANTINE_INLINE static inline __attribute__((always_inline))

  QUANTINE_INLINE Int load(const std::uint8_t* bytes) {
    const auto* halves = reinterpret_cast<const __m256i*>(bytes);
    return {_mm256_load_si256(halves), _mm256_load_si256(halves + 1)};
  }
  QUANTINE_INLINE Int nothing() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  template <int kDown>
  QUANTINE_INLINE __m256i down(__m256i a) {
    if constexpr (kDown > 0) return _mm256_srli_epi32(a, kDown);
    if constexpr (kDown < 0) return _mm256_slli_epi32(a, -kDown);
    return a;
  }
  template <int kDown, std::uint32_t kMask>
  QUANTINE_INLINE Int field(Int a) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(kMask));
    return {_mm256_and_si256(down<kDown>(a.low), mask),
            _mm256_and_si256(down<kDown>(a.high), mask)};
  }
  QUANTINE_INLINE Int join(Int a, Int b) {
    return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
  }
  // Even and odd bytes as 16 bit.
  struct Wide {
    __m256i low_even, low_odd, high_even, high_odd;
  };
  QUANTINE_INLINE Wide widen(Int codes) {
    const __m256i even = _mm256_set1_epi16(0xff);
    return {_mm256_and_si256(codes.low, even), _mm256_srli_epi16(codes.low, 8),
            _mm256_and_si256(codes.high, even), _mm256_srli_epi16(codes.high, 8)};
  }
  QUANTINE_INLINE __m256i two(const std::uint8_t* codes) {
    std::int32_t word;
    std::memcpy(&word, codes, sizeof word);
    return _mm256_set1_epi32(word);
  }
  QUANTINE_INLINE Sum no_sum() { return nothing(); }
  QUANTINE_INLINE __m256i add_products(__m256i acc, __m256i codes, __m256i x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(codes, x));
  }
  QUANTINE_INLINE Sum dot(Sum acc, Wide codes, const std::uint8_t* x) {
    const __m256i even = two(x), odd = two(x + 2 * sizeof(std::int16_t));
    return {add_products(add_products(acc.low, codes.low_even, even), codes.low_odd, odd),
            add_products(add_products(acc.high, codes.high_even, even), codes.high_odd, odd)};
  }
  QUANTINE_INLINE Sum dot(Sum acc, Int codes, const std::uint8_t* x) {
    return dot(acc, widen(codes), x);
  }
  QUANTINE_INLINE Int plus(Int a, Int b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
  }
  QUANTINE_INLINE Int whole(Sum a) { return a; }
  template <int k>
  QUANTINE_INLINE Float byte(Int codes) {
    return to_float(field<8 * k, 0xffu>(codes));
  }
  QUANTINE_INLINE Float to_float(Int a) {
    return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)};
  }

  QUANTINE_INLINE Float set(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  QUANTINE_INLINE Float halves(const void* values) {
    const auto* parts = static_cast<const __m128i*>(values);
    return {_mm256_cvtph_ps(_mm_loadu_si128(parts)), _mm256_cvtph_ps(_mm_loadu_si128(parts + 1))};
  }
  QUANTINE_INLINE Float floats(const void* values) {
    const auto* parts = static_cast<const float*>(values);
    return {_mm256_loadu_ps(parts), _mm256_loadu_ps(parts + 8)};
  }

  // How 16 codes of some bits without gaps come apart: the two bytes that hold each, and its place
  // in them.
  struct Spreader {
    Int bytes, shifts;
    __m256i mask;
  };
  static inline Spreader spreader(int bits) {
    alignas(64) std::uint32_t bytes[kTile], shifts[kTile];
    for (std::uint32_t r = 0; r < kTile; ++r) {
      const std::uint32_t bit = r * static_cast<std::uint32_t>(bits);
      bytes[r] = 0x80800000u | (std::min(bit / 8 + 1, 15u) << 8) | std::min(bit / 8, 15u);
      shifts[r] = bit % 8;
    }
    return {load(reinterpret_cast<const std::uint8_t*>(bytes)),
            load(reinterpret_cast<const std::uint8_t*>(shifts)),
            _mm256_set1_epi32((1 << std::min(bits, 8)) - 1)};
  }
  QUANTINE_INLINE __m256 eight(__m256i all, __m256i bytes, __m256i shifts, __m256i mask) {
    const __m256i pairs = _mm256_shuffle_epi8(all, bytes);
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(pairs, shifts), mask));
  }
  QUANTINE_INLINE Float spread(const std::uint8_t* bytes, const Spreader& s) {
    const __m256i all =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    return {eight(all, s.bytes.low, s.shifts.low, s.mask),
            eight(all, s.bytes.high, s.shifts.high, s.mask)};
  }
  QUANTINE_INLINE Float magnitude(Float a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
  }
  QUANTINE_INLINE __m256 larger(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
  // Of numbers that are not negative, by their bits: NaN is larger than infinity.
  QUANTINE_INLINE Float larger(Float a, Float b) {
    return {larger(a.low, b.low), larger(a.high, b.high)};
  }
  static inline float largest(Float a) {
    std::int32_t lanes[kTile], found = 0;
    store(reinterpret_cast<float*>(lanes), a);
    for (const std::int32_t lane : lanes) found = found >= lane ? found : lane;
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(found)));
  }
  // Eight codes as 16 bit, chunk by chunk: the even ones, then the odd ones.
  QUANTINE_INLINE __m128i sixteen_bits(__m256i codes) {
    const __m256i order =
        _mm256_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,
                         0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i halves = _mm256_shuffle_epi8(codes, order);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
  }
  static inline float sum(Float a) {
    const __m256 both = _mm256_add_ps(a.low, a.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
  // Whole numbers within 16 bit, to even on ties, of some times 16 inputs, which they become.
  template <int kParts>
  QUANTINE_INLINE void round(std::uint8_t* out, Float (&a)[kParts]) {
    auto* parts = reinterpret_cast<__m128i*>(out);
    for (Float& one : a) {
      const __m256i low = _mm256_cvtps_epi32(one.low), high = _mm256_cvtps_epi32(one.high);
      _mm_storeu_si128(parts++, sixteen_bits(low));
      _mm_storeu_si128(parts++, sixteen_bits(high));
      one = {_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)};
    }
  }
  QUANTINE_INLINE Float add(Float a, Float b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  QUANTINE_INLINE Float sub(Float a, Float b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
  }
  QUANTINE_INLINE Float mul(Float a, Float b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
  }
  QUANTINE_INLINE Float fma(Float a, Float b, Float c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  QUANTINE_INLINE Float fnma(Float a, Float b, Float c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
  }
  QUANTINE_INLINE void store(float* out, Float a) {
    _mm256_storeu_ps(out, a.low);
    _mm256_storeu_ps(out + 8, a.high);
  }
  template <typename T>
  static void turn(const Strip& strip, std::size_t count, T* out, std::size_t stride) {
    turn_slowly(strip, count, out, stride);
  }
  // out[e] = x[columns[e]] * value[e].
  static inline void products(const std::uint16_t* columns, const std::uint16_t* halves,
                              const float* floats, std::size_t count, const float* x, float* out) {
    std::size_t e = 0;
    for (; e + 8 <= count; e += 8) {
      const __m256i at =
          _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + e)));
      const __m256 value =
          halves ? _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + e)))
                 : _mm256_loadu_ps(floats + e);
      _mm256_storeu_ps(out + e, _mm256_mul_ps(_mm256_i32gather_ps(x, at, 4), value));
    }
    for (; e < count; ++e) out[e] = x[columns[e]] * (halves ? _cvtsh_ss(halves[e]) : floats[e]);
  }
#undef QUANTINE_INLINE
};

}  // namespace

const Level& avx2_level() {
  static const Level level = level_of<Avx2>("avx2");
  return level;
}

}  // namespace quantine
