// Compiled for AMX; called only where the processor has it, AVX-512 with VNNI, and the system's
// permission.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "integer_avx512.h"

namespace quantine {
namespace {

constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr long kTileData = 18;               // the state component of tiles
constexpr unsigned kTiles = 1u << 24, kIntegers = 1u << 25;  // of CPUID leaf 7, EDX
constexpr std::size_t kLanes = 16, kStep = 64, kVector = 64;
constexpr std::size_t kFewRows = 8;  // that tiles would hardly be filled with
constexpr std::size_t kStrip = 32;  // rows of activations, and outputs, of four tiles of sums

struct alignas(64) Configuration {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Sums of a group, [2, 2, 16, 16]: 16 rows by 16 outputs of a tile, for both tiles; then the next
// 16 rows.
struct alignas(64) Sums {
  std::int32_t at[4 * 256];
};

// 32 rows of activations meet one or two tiles in one group.
template <bool kTwo>
inline void sum_group(const Panel& panel, std::size_t tile, const Codes& a, std::size_t row,
                      std::size_t group, Sums& sums) {
  const Span& span = a.spans[group];
  const std::uint8_t* x = a.codes + row * a.stride + span.start;
  const std::int8_t* w = panel.codes + (tile * a.stride + span.start) * kLanes;
  const std::int32_t* first = panel.first + (tile * a.groups + group) * kLanes;
  const std::size_t next_tile = a.stride * kLanes;
  // A stride of zero repeats what sums begin with in every row.
  _tile_loadd(0, first, 0);
  _tile_loadd(2, first, 0);
  if constexpr (kTwo) {
    _tile_loadd(1, first + a.groups * kLanes, 0);
    _tile_loadd(3, first + a.groups * kLanes, 0);
  }
  for (std::size_t i = 0; i < span.padded; i += kStep) {
    _tile_loadd(4, x + i, a.stride);
    _tile_loadd(5, x + i + 16 * a.stride, a.stride);
    _tile_loadd(6, w + i * kLanes, kVector);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(2, 5, 6);
    if constexpr (kTwo) {
      _tile_loadd(7, w + i * kLanes + next_tile, kVector);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(3, 5, 7);
    }
  }
  _tile_stored(0, sums.at, kVector);
  _tile_stored(2, sums.at + 512, kVector);
  if constexpr (kTwo) {
    _tile_stored(1, sums.at + 256, kVector);
    _tile_stored(3, sums.at + 768, kVector);
  }
}

// Adds the sums of some groups to 16 rows of results of one tile.
inline void add_groups(const Panel& panel, std::size_t tile, const Codes& a, std::size_t row,
                       std::size_t group, std::size_t count, std::size_t part, const Sums* sums,
                       float* results) {
  __m512 total[16];
  for (std::size_t r = 0; r < 16; ++r) total[r] = _mm512_load_ps(results + r * kStrip);
  for (std::size_t g = 0; g < count; ++g) {
    const std::size_t place = (tile * a.groups + group + g) * kLanes;
    const __m512 scale = _mm512_loadu_ps(panel.scales + place);
    const std::int32_t* from = sums[g].at + part * 256;
    if (panel.rests == nullptr) {
      for (std::size_t r = 0; r < 16; ++r)
        total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(from + r * kLanes)), scale, total[r]);
      continue;
    }
    const __m512 rest = _mm512_loadu_ps(panel.rests + place);
    for (std::size_t r = 0; r < 16; ++r) {
      const __m512 codes = _mm512_set1_ps(a.sums[(row + r) * a.groups + group + g]);
      const __m512 whole = _mm512_cvtepi32_ps(_mm512_load_si512(from + r * kLanes));
      total[r] = _mm512_fmadd_ps(_mm512_fnmadd_ps(rest, codes, whole), scale, total[r]);
    }
  }
  for (std::size_t r = 0; r < 16; ++r) _mm512_store_ps(results + r * kStrip, total[r]);
}

template <bool kTwo>
void multiply_strip(const Panel& panel, std::size_t tile, const Codes& a, std::size_t row,
                    float* results) {
  constexpr std::size_t kGroups = 4;  // that wait for their scales
  Sums sums[kGroups];
  for (std::size_t r = 0; r < kStrip; ++r)
    for (std::size_t t = 0; t < (kTwo ? 2u : 1u); ++t)
      _mm512_store_ps(results + r * kStrip + t * kLanes,
                      _mm512_loadu_ps(panel.begin + (tile + t) * kLanes));
  for (std::size_t group = 0; group < a.groups; group += kGroups) {
    const std::size_t count = std::min(kGroups, a.groups - group);
    for (std::size_t g = 0; g < count; ++g)
      sum_group<kTwo>(panel, tile, a, row, group + g, sums[g]);
    for (std::size_t half = 0; half < 2; ++half)
      for (std::size_t t = 0; t < (kTwo ? 2u : 1u); ++t)
        add_groups(panel, tile + t, a, row + half * 16, group, count, half * 2 + t, sums,
                   results + half * 16 * kStrip + t * kLanes);
  }
}

void multiply(const Panel& panel, std::size_t tile, bool two, const Codes& a, std::size_t row,
              std::size_t rows, float* results) {
  if (rows <= kFewRows) return multiply_avx512(panel, tile, two, a, row, rows, results);
  const Configuration configuration;
  _tile_loadconfig(&configuration);
  for (std::size_t done = 0; done < rows; done += kStrip) {
    float* strip = results + done * kStrip;
    if (two) multiply_strip<true>(panel, tile, a, row + done, strip);
    else multiply_strip<false>(panel, tile, a, row + done, strip);
  }
  _tile_release();
}

}  // namespace

bool allow_integer_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kTiles) == 0 || (d & kIntegers) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const IntegerLevel& integer_amx() {
  static const IntegerLevel level = {"amx", kStep, centre_avx512, multiply};
  return level;
}

}  // namespace quantine
