// Packing and unpacking, with a loop for each width, which is a constant in it.
#include "bits/bits.h"

namespace quantine {
namespace {

// Eight codes of B bits are exactly B bytes: the loops move whole octets and finish with the rest.
template <int B>
void pack_row(const std::uint8_t* codes, std::uint8_t* packed, std::size_t columns) {
  std::size_t j = 0;
  for (; j + 8 <= columns; j += 8, packed += B) {
    std::uint64_t word = 0;
    for (int k = 0; k < 8; ++k) word |= static_cast<std::uint64_t>(codes[j + k]) << (B * k);
    for (int k = 0; k < B; ++k) packed[k] = static_cast<std::uint8_t>(word >> (8 * k));
  }
  if (j == columns) return;
  std::uint64_t word = 0;
  const int rest = static_cast<int>(columns - j);
  for (int k = 0; k < rest; ++k) word |= static_cast<std::uint64_t>(codes[j + k]) << (B * k);
  for (int k = 0; k < (rest * B + 7) / 8; ++k)
    packed[k] = static_cast<std::uint8_t>(word >> (8 * k));
}

template <int B>
void unpack_row(const std::uint8_t* packed, std::uint8_t* codes, std::size_t columns) {
  constexpr std::uint64_t mask = (1u << B) - 1;
  std::size_t j = 0;
  for (; j + 8 <= columns; j += 8, packed += B) {
    std::uint64_t word = 0;
    for (int k = 0; k < B; ++k) word |= static_cast<std::uint64_t>(packed[k]) << (8 * k);
    for (int k = 0; k < 8; ++k) codes[j + k] = static_cast<std::uint8_t>(word >> (B * k) & mask);
  }
  if (j == columns) return;
  std::uint64_t word = 0;
  const int rest = static_cast<int>(columns - j);
  for (int k = 0; k < (rest * B + 7) / 8; ++k)
    word |= static_cast<std::uint64_t>(packed[k]) << (8 * k);
  for (int k = 0; k < rest; ++k) codes[j + k] = static_cast<std::uint8_t>(word >> (B * k) & mask);
}

template <int B>
struct Width {
  static void pack(const std::uint8_t* codes, std::uint8_t* packed, std::size_t rows,
                   std::size_t columns) {
    for (std::size_t r = 0; r < rows; ++r)
      pack_row<B>(codes + r * columns, packed + r * packed_bytes(columns, B), columns);
  }
  static void unpack(const std::uint8_t* packed, std::uint8_t* codes, std::size_t rows,
                     std::size_t columns) {
    for (std::size_t r = 0; r < rows; ++r)
      unpack_row<B>(packed + r * packed_bytes(columns, B), codes + r * columns, columns);
  }
};

using Loop = void (*)(const std::uint8_t*, std::uint8_t*, std::size_t, std::size_t);
constexpr Loop kPack[] = {Width<1>::pack, Width<2>::pack, Width<3>::pack, Width<4>::pack,
                          Width<5>::pack, Width<6>::pack, Width<7>::pack, Width<8>::pack};
constexpr Loop kUnpack[] = {Width<1>::unpack, Width<2>::unpack, Width<3>::unpack,
                            Width<4>::unpack, Width<5>::unpack, Width<6>::unpack,
                            Width<7>::unpack, Width<8>::unpack};

}  // namespace

void pack_bits(const std::uint8_t* codes, std::uint8_t* packed, std::size_t rows,
               std::size_t columns, int bits) {
  kPack[bits - 1](codes, packed, rows, columns);
}

void unpack_bits(const std::uint8_t* packed, std::uint8_t* codes, std::size_t rows,
                 std::size_t columns, int bits) {
  kUnpack[bits - 1](packed, codes, rows, columns);
}

}  // namespace quantine
