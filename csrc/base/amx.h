// What files compiled for AMX share: asking for tiles, and their shape. Nothing here may be shared
// with other files, which run on other processors too.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace quantine {
namespace {

// Of CPUID leaf 7, EDX.
constexpr unsigned kHasTiles = 1u << 24, kHasBfloat16Tiles = 1u << 22, kHasIntegerTiles = 1u << 25;

// Whether the processor has tiles and `products`, one of the above; asks the system for them if so.
bool ask_for_tiles(unsigned products) {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // the state component of tiles
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kHasTiles) == 0 || (d & products) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Eight tiles of 16 rows of 64 bytes, as instructions take it.
struct alignas(64) TileConfiguration {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace
}  // namespace quantine
