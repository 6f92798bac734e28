// Python bindings of packed codes.
#include "bits/bits.h"

#include <cstdint>

#include "bindings.h"

namespace {

template <typename Codes, typename Packed>
void check(const Codes& codes, const Packed& packed, int bits) {
  if (bits < 1 || bits > 8) throw nb::value_error("bits must be 1 to 8");
  if (packed.shape(0) != codes.shape(0) ||
      packed.shape(1) != quantine::packed_bytes(codes.shape(1), bits))
    throw nb::value_error("packed must be [rows, packed_bytes(columns, bits)]");
}

void pack_bits(Array<const std::uint8_t> codes, Array<std::uint8_t> packed, int bits) {
  check(codes, packed, bits);
  nb::gil_scoped_release release;
  quantine::pack_bits(codes.data(), packed.data(), codes.shape(0), codes.shape(1), bits);
}

void unpack_bits(Array<const std::uint8_t> packed, Array<std::uint8_t> codes, int bits) {
  check(codes, packed, bits);
  nb::gil_scoped_release release;
  quantine::unpack_bits(packed.data(), codes.data(), codes.shape(0), codes.shape(1), bits);
}

}  // namespace

void bind_bits(nb::module_& m) {
  m.def("pack_bits", &pack_bits, nb::arg("codes"), nb::arg("packed"), nb::arg("bits"));
  m.def("unpack_bits", &unpack_bits, nb::arg("packed"), nb::arg("codes"), nb::arg("bits"));
}
