// Python bindings: check dtype, shape and contiguity, then call. No arithmetic here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "bits.h"

namespace nb = nanobind;

namespace {

template <typename T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename Codes, typename Packed>
void check(const Codes& codes, const Packed& packed, int bits) {
  if (bits < 1 || bits > 8) throw nb::value_error("bits must be 1 to 8");
  if (packed.shape(0) != codes.shape(0) ||
      packed.shape(1) != quantine::packed_bytes(codes.shape(1), bits))
    throw nb::value_error("packed must be [rows, packed_bytes(columns, bits)]");
}

void pack_bits(Matrix<const std::uint8_t> codes, Matrix<std::uint8_t> packed, int bits) {
  check(codes, packed, bits);
  nb::gil_scoped_release release;
  quantine::pack_bits(codes.data(), packed.data(), codes.shape(0), codes.shape(1), bits);
}

void unpack_bits(Matrix<const std::uint8_t> packed, Matrix<std::uint8_t> codes, int bits) {
  check(codes, packed, bits);
  nb::gil_scoped_release release;
  quantine::unpack_bits(packed.data(), codes.data(), codes.shape(0), codes.shape(1), bits);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "quantine's native kernels; called through quantine.kernels only.";
  m.def("pack_bits", &pack_bits, nb::arg("codes"), nb::arg("packed"), nb::arg("bits"));
  m.def("unpack_bits", &unpack_bits, nb::arg("packed"), nb::arg("codes"), nb::arg("bits"));
}
