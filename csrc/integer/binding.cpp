// Python bindings of products in integers.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>

#include "bindings.h"
#include "integer/integer.h"

namespace {

using quantine::InputGrid;
using quantine::Matrix;
using quantine::Pool;

using Floats = std::optional<Vector<const float>>;

InputGrid grid_of(int bits, const Floats& scale, const Floats& zero, const Floats& above,
                  const Floats& below) {
  InputGrid grid;
  grid.bits = bits;
  if (bits < 2 || bits > 8) throw nb::value_error("inputs have 2 to 8 bits");
  if (scale.has_value() != zero.has_value() || (scale && scale->shape(0) != zero->shape(0)))
    throw nb::value_error("scales and zero points of inputs come together");
  if (scale) {
    grid.scale.assign(scale->data(), scale->data() + scale->shape(0));
    grid.zero.assign(zero->data(), zero->data() + zero->shape(0));
  }
  if (above.has_value() != below.has_value() ||
      (above && (!scale || above->shape(0) != scale->shape(0) ||
                 below->shape(0) != scale->shape(0))))
    throw nb::value_error("factors of tokens need two numbers for each scale of inputs");
  if (above) {
    grid.above.assign(above->data(), above->data() + above->shape(0));
    grid.below.assign(below->data(), below->data() + below->shape(0));
  }
  return grid;
}

void check(const Matrix& matrix, const InputGrid& grid, std::size_t columns) {
  const quantine::Weights& w = matrix.weights();
  if (w.bits > 8 || w.group_rows != 0)
    throw nb::value_error("integers need packed weights whose groups run along inputs");
  if (columns != w.columns) throw nb::value_error("x must be [batch, columns]");
  if (!grid.scale.empty() && grid.scale.size() != w.groups)
    throw nb::value_error("inputs need one scale for each group of weights, or none");
}

void multiply(const Matrix& matrix, const InputGrid& grid, Array<const float> x, Array<float> y,
              const std::string& level, Pool& pool) {
  check(matrix, grid, x.shape(1));
  if (y.shape(0) != x.shape(0) || y.shape(1) != matrix.rows())
    throw nb::value_error("y must be [batch, rows]");
  nb::gil_scoped_release release;
  quantine::multiply_integer(matrix, grid, x.data(), x.shape(0), y.data(), level, pool);
}

void codes(const Matrix& matrix, const InputGrid& grid, Array<const float> x,
           Array<std::uint8_t> out, Pool& pool) {
  check(matrix, grid, x.shape(1));
  if (out.shape(0) != x.shape(0) || out.shape(1) != x.shape(1))
    throw nb::value_error("codes must be [batch, columns]");
  nb::gil_scoped_release release;
  quantine::integer_codes(matrix, grid, x.data(), x.shape(0), out.data(), pool);
}

}  // namespace

void bind_integer(nb::module_& m) {
  nb::class_<InputGrid>(m, "InputGrid")
      .def("__init__",
           [](InputGrid* self, int bits, const Floats& scale, const Floats& zero,
              const Floats& above, const Floats& below) {
             new (self) InputGrid(grid_of(bits, scale, zero, above, below));
           },
           nb::arg("bits"), nb::arg("scale").none() = nb::none(),
           nb::arg("zero").none() = nb::none(), nb::arg("above").none() = nb::none(),
           nb::arg("below").none() = nb::none());
  m.attr("LONGEST_GROUP") = quantine::kLongestGroup;
  m.def("integer_levels", &quantine::integer_levels);
  m.def("multiply_integer", &multiply, nb::arg("matrix"), nb::arg("grid"), nb::arg("x"),
        nb::arg("y"), nb::arg("level"), nb::arg("pool"));
  m.def("integer_codes", &codes, nb::arg("matrix"), nb::arg("grid"), nb::arg("x"), nb::arg("codes"),
        nb::arg("pool"));
}
