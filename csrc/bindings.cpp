// Python bindings: check dtype, shape and contiguity, then call. No arithmetic here.
#include "bindings.h"

#include <nanobind/stl/optional.h>

#include <optional>

#include "bits.h"
#include "columns.h"

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

template <typename T>
using Strided = nb::ndarray<T, nb::ndim<2>, nb::device::cpu>;

void check_bits(int bits) {
  if (bits < 1 || bits > 8) throw nb::value_error("bits must be 1 to 8");
}

void cheapest_grids(Strided<const float> columns, Vector<const float> importance,
                    Array<const float> scales, Array<const float> zeros,
                    Vector<std::int64_t> best, int bits, float price) {
  check_bits(bits);
  const std::size_t n = columns.shape(0), rows = columns.shape(1);
  if (rows > 1 && columns.stride(1) != 1)
    throw nb::value_error("rows of columns must be contiguous");
  if (importance.shape(0) != n || best.shape(0) != rows || scales.shape(1) != rows ||
      zeros.shape(1) != rows || zeros.shape(0) != scales.shape(0))
    throw nb::value_error("columns must be [n, rows], importance [n], grids [candidates, rows]");
  nb::gil_scoped_release release;
  quantine::cheapest_grids(columns.data(), static_cast<std::size_t>(columns.stride(0)),
                           importance.data(), scales.data(), zeros.data(), best.data(), n, rows,
                           scales.shape(0), bits, price);
}

void round_columns(Array<float> current, Array<const float> local, Array<const float> scales,
                   Array<const float> zeros, Array<std::uint8_t> codes, Array<float> errors,
                   std::optional<Array<std::uint8_t>> kept, int bits, float price) {
  check_bits(bits);
  const std::size_t n = current.shape(0), rows = current.shape(1);
  const auto is = [&](const auto& matrix) {
    return matrix.shape(0) == n && matrix.shape(1) == rows;
  };
  const bool shared = scales.shape(0) == 1 && n != 1;
  const bool grids = zeros.shape(0) == scales.shape(0) && zeros.shape(1) == rows &&
                     scales.shape(1) == rows && (shared || scales.shape(0) == n);
  if (!is(codes) || !is(errors) || (kept && !is(*kept)) || !grids || local.shape(0) != n ||
      local.shape(1) != n)
    throw nb::value_error("local must be [n, n], grids [n or 1, rows], everything else [n, rows]");
  nb::gil_scoped_release release;
  quantine::round_columns(current.data(), local.data(), scales.data(), zeros.data(),
                          shared ? 0 : rows, codes.data(), errors.data(),
                          kept ? kept->data() : nullptr, n, rows, bits, price);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "quantine's native kernels; called through quantine.kernels only.";
  m.def("pack_bits", &pack_bits, nb::arg("codes"), nb::arg("packed"), nb::arg("bits"));
  m.def("unpack_bits", &unpack_bits, nb::arg("packed"), nb::arg("codes"), nb::arg("bits"));
  m.def("cheapest_grids", &cheapest_grids, nb::arg("columns"), nb::arg("importance"),
        nb::arg("scales"), nb::arg("zeros"), nb::arg("best"), nb::arg("bits"), nb::arg("price"));
  m.def("round_columns", &round_columns, nb::arg("current"), nb::arg("local"), nb::arg("scales"),
        nb::arg("zeros"), nb::arg("codes"), nb::arg("errors"), nb::arg("kept").none(),
        nb::arg("bits"), nb::arg("price"));
  bind_matrix(m);
}
