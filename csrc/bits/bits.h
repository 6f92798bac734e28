// Codes of few bits, packed without gaps: the bit streams of files and of caches.
#pragma once
#include <cstddef>
#include <cstdint>

namespace quantine {

// Rows of `columns` codes of `bits` bits (1 to 8) as little-endian bit streams that each end on a
// byte boundary: docs/format.md, section "bit streams".
inline std::size_t packed_bytes(std::size_t columns, int bits) {
  return (columns * static_cast<std::size_t>(bits) + 7) / 8;
}

// codes: [rows, columns], each below 2^bits. packed: [rows, packed_bytes(columns, bits)].
void pack_bits(const std::uint8_t* codes, std::uint8_t* packed, std::size_t rows,
               std::size_t columns, int bits);
void unpack_bits(const std::uint8_t* packed, std::uint8_t* codes, std::size_t rows,
                 std::size_t columns, int bits);

}  // namespace quantine
