// Python bindings of packed matrices. Float16 comes as int16, bit for bit.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"
#include "matrix/relayout.h"

namespace {

using quantine::Arithmetic;
using quantine::Kept;
using quantine::Matrix;
using quantine::Pool;
using Halves = Array<const std::int16_t>;
using Codes = Array<const std::uint8_t>;

const std::uint16_t* half_bits(const std::int16_t* data) {
  return reinterpret_cast<const std::uint16_t*>(data);
}

// Scales or zero points: `stored` alone are float16 or whole numbers; with `steps` and `zeros` they
// are codes of a second grid.
struct Statistic {
  std::optional<Halves> halves;
  std::optional<Codes> codes;
  std::optional<Halves> steps, zeros;
  int bits;
  std::size_t span;
  int exponent;
};

quantine::StatisticSource source_of(const Statistic& s, std::size_t lines, std::size_t groups) {
  quantine::StatisticSource found;
  found.bits = s.bits;
  found.factor = std::ldexp(1.0f, s.exponent);
  if (s.bits < 1 || s.bits > 16) throw nb::value_error("bits of a statistic must be 1 to 16");
  if (s.halves) {
    if (s.halves->shape(0) != lines || s.halves->shape(1) != groups)
      throw nb::value_error("float16 statistics must be [lines, groups]");
    found.kept = Kept::kHalf;
    found.halves = half_bits(s.halves->data());
  } else if (s.codes) {
    if (s.bits > 8) throw nb::value_error("codes of a statistic have at most 8 bits");
    found.codes = s.codes->data();
    found.kept = s.steps ? Kept::kCoded : Kept::kWhole;
    const bool turned = found.kept == Kept::kCoded;
    if (s.codes->shape(turned ? 1 : 0) != lines || s.codes->shape(turned ? 0 : 1) != groups)
      throw nb::value_error("coded statistics must be [groups, lines], whole ones [lines, groups]");
    if (turned) {
      if (s.span < 1) throw nb::value_error("a second grid must span a line");
      found.span = std::min(s.span, lines);
      const std::size_t spans = (lines + found.span - 1) / found.span;
      if (!s.zeros || s.steps->shape(0) != groups || s.steps->shape(1) != spans ||
          s.zeros->shape(0) != groups || s.zeros->shape(1) != spans)
        throw nb::value_error("steps and zeros must be [groups, spans]");
      found.steps = half_bits(s.steps->data());
      found.zeros = half_bits(s.zeros->data());
    }
  }
  return found;
}

void check_indices(const std::int64_t* indices, std::size_t count, std::size_t below) {
  for (std::size_t i = 0; i < count; ++i)
    if (indices[i] < 0 || static_cast<std::size_t>(indices[i]) >= below)
      throw nb::value_error("an index is out of range");
}

struct Outliers {
  Vector<const std::int64_t> offsets, columns;
  std::optional<Vector<const std::int16_t>> halves;
  std::optional<Vector<const float>> floats;
};

void add_outliers(quantine::Source& source, const Outliers& outliers) {
  const std::size_t entries = outliers.columns.shape(0);
  const std::int64_t* offsets = outliers.offsets.data();
  if (outliers.offsets.shape(0) != source.rows + 1 || offsets[0] != 0 ||
      static_cast<std::size_t>(offsets[source.rows]) != entries || entries >= (1ull << 32))
    throw nb::value_error("offsets of outliers must be [rows + 1], from 0 to their number");
  for (std::size_t row = 0; row < source.rows; ++row)
    if (offsets[row] > offsets[row + 1]) throw nb::value_error("offsets must ascend");
  check_indices(outliers.columns.data(), entries, source.columns);
  if (outliers.halves.has_value() == outliers.floats.has_value() ||
      (outliers.halves ? outliers.halves->shape(0) : outliers.floats->shape(0)) != entries)
    throw nb::value_error("outliers need one value each, in float16 or float32");
  source.outlier_offsets = offsets;
  source.outlier_columns = outliers.columns.data();
  if (outliers.halves) source.outlier_halves = half_bits(outliers.halves->data());
  if (outliers.floats) source.outlier_floats = outliers.floats->data();
}

void add_sizes(quantine::Source& source, const Vector<const std::int64_t>& sizes) {
  std::size_t end = 0;
  for (std::size_t group = 0; group < sizes.shape(0); ++group) {
    const std::int64_t size = sizes.data()[group];
    if (size < 1 || static_cast<std::size_t>(size) > source.columns - end)
      throw nb::value_error("sizes of groups must be positive and sum to the columns");
    source.ends.push_back(end += static_cast<std::size_t>(size));
  }
  if (end != source.columns || source.along_outputs)
    throw nb::value_error("sizes of groups must sum to the columns, along which they run");
}

Matrix packed(Codes codes, int bits, std::size_t group_size, bool along_outputs,
              const Statistic& scale, const Statistic& zero,
              std::optional<Vector<const std::int64_t>> order,
              const std::optional<Outliers>& outliers, Pool& pool,
              std::optional<Vector<const std::int64_t>> sizes) {
  quantine::Source source;
  source.rows = codes.shape(0);
  source.columns = codes.shape(1);
  source.along_outputs = along_outputs;
  source.bits = bits;
  source.codes = codes.data();
  if (bits < 2 || bits > 8) throw nb::value_error("bits must be 2 to 8");
  if (source.rows == 0 || source.columns == 0 || (group_size == 0 && !sizes))
    throw nb::value_error("a matrix needs rows, columns and groups");
  const std::size_t lines = along_outputs ? source.columns : source.rows;
  const std::size_t length = along_outputs ? source.rows : source.columns;
  source.group_size = std::min(group_size, length);
  if (sizes) add_sizes(source, *sizes);
  const std::size_t groups =
      sizes ? source.ends.size() : (length + source.group_size - 1) / source.group_size;
  source.scale = source_of(scale, lines, groups);
  source.zero = source_of(zero, lines, groups);
  if (source.scale.kept != Kept::kHalf && source.scale.kept != Kept::kCoded)
    throw nb::value_error("scales are float16, or codes of a second grid");
  if (source.zero.kept == Kept::kMiddle || source.zero.kept == Kept::kWhole)
    source.zero.bits = bits;
  if (order) {
    if (order->shape(0) != source.columns) throw nb::value_error("order must be [columns]");
    check_indices(order->data(), source.columns, source.columns);
    source.order = order->data();
  }
  if (outliers) add_outliers(source, *outliers);
  nb::gil_scoped_release release;
  return Matrix(quantine::relayout(source, pool));
}

Matrix from_half(Halves values, Pool& pool) {
  if (values.size() == 0) throw nb::value_error("a matrix needs rows and columns");
  nb::gil_scoped_release release;
  return Matrix(
      quantine::relayout(half_bits(values.data()), values.shape(0), values.shape(1), pool));
}

Matrix from_float(Array<const float> values, Pool& pool) {
  if (values.size() == 0) throw nb::value_error("a matrix needs rows and columns");
  nb::gil_scoped_release release;
  return Matrix(quantine::relayout(values.data(), values.shape(0), values.shape(1), pool));
}

void multiply(const std::vector<const Matrix*>& matrices, Array<const float> x,
              const std::vector<Array<float>>& ys, bool exact, Pool& pool) {
  if (matrices.size() != ys.size()) throw nb::value_error("every matrix needs an output");
  std::vector<quantine::Product> products;
  for (std::size_t i = 0; i < ys.size(); ++i) {
    const Matrix& matrix = *matrices[i];
    if (matrix.columns() != x.shape(1) || ys[i].shape(0) != x.shape(0) ||
        ys[i].shape(1) != matrix.rows())
      throw nb::value_error("x must be [batch, columns], every y [batch, rows]");
    products.push_back({&matrix, ys[i].data()});
  }
  nb::gil_scoped_release release;
  quantine::multiply(products.data(), products.size(), x.data(), x.shape(0),
                     exact ? Arithmetic::kExact : Arithmetic::kFast, pool);
}

// For every expert some matrices, which all read its rows of `x`: `counts` of them after those of
// the expert before. `ys` has the results of the first matrix of every expert, of the second, ...
void multiply_grouped(const std::vector<std::vector<const Matrix*>>& experts, Array<const float> x,
                      const std::vector<std::size_t>& counts, const std::vector<Array<float>>& ys,
                      bool exact, Pool& pool) {
  if (experts.size() != counts.size()) throw nb::value_error("every expert needs a count of rows");
  std::vector<quantine::OwnProduct> products;
  std::size_t first = 0;
  for (std::size_t e = 0; e < experts.size(); ++e) {
    if (counts[e] > x.shape(0) - first || experts[e].size() != ys.size())
      throw nb::value_error("counts must sum to the rows of x, every matrix needs an output");
    for (std::size_t i = 0; i < ys.size(); ++i) {
      const Matrix& matrix = *experts[e][i];
      if (matrix.columns() != x.shape(1) || ys[i].shape(0) != x.shape(0) ||
          ys[i].shape(1) != matrix.rows())
        throw nb::value_error("x must be [batch, columns], every y [batch, rows]");
      products.push_back({&matrix, x.data() + first * x.shape(1), counts[e],
                          ys[i].data() + first * matrix.rows()});
    }
    first += counts[e];
  }
  if (first != x.shape(0)) throw nb::value_error("counts must sum to the rows of x");
  nb::gil_scoped_release release;
  quantine::multiply_grouped(products.data(), products.size(),
                             exact ? Arithmetic::kExact : Arithmetic::kFast, pool);
}

void check_rows(const Matrix& matrix, std::size_t first, std::size_t count, std::size_t columns) {
  if (columns != matrix.columns() || first > matrix.rows() || count > matrix.rows() - first)
    throw nb::value_error("out must be [count, columns], within the rows of the matrix");
}

void decode(const Matrix& matrix, std::size_t first, Array<float> out, Pool& pool) {
  check_rows(matrix, first, out.shape(0), out.shape(1));
  nb::gil_scoped_release release;
  matrix.decode(first, out.shape(0), out.data(), pool);
}

// Bfloat16 comes as int16, too.
void decode_bfloat16(const Matrix& matrix, std::size_t first, Array<std::int16_t> out,
                     Pool& pool) {
  check_rows(matrix, first, out.shape(0), out.shape(1));
  nb::gil_scoped_release release;
  matrix.decode(first, out.shape(0), reinterpret_cast<std::uint16_t*>(out.data()), pool);
}

}  // namespace

void bind_matrix(nb::module_& m) {
  nb::class_<Statistic>(m, "Statistic")
      .def("__init__",
           [](Statistic* self, std::optional<Halves> halves, std::optional<Codes> codes,
              std::optional<Halves> steps, std::optional<Halves> zeros, int bits,
              std::size_t span, int exponent) {
             new (self) Statistic{std::move(halves), std::move(codes), std::move(steps),
                                  std::move(zeros), bits, span, exponent};
           },
           nb::arg("halves").none() = nb::none(), nb::arg("codes").none() = nb::none(),
           nb::arg("steps").none() = nb::none(), nb::arg("zeros").none() = nb::none(),
           nb::arg("bits") = 8, nb::arg("span") = 0, nb::arg("exponent") = 0);
  nb::class_<Outliers>(m, "Outliers")
      .def("__init__",
           [](Outliers* self, Vector<const std::int64_t> offsets,
              Vector<const std::int64_t> columns, std::optional<Vector<const std::int16_t>> halves,
              std::optional<Vector<const float>> floats) {
             new (self) Outliers{std::move(offsets), std::move(columns), std::move(halves),
                                 std::move(floats)};
           },
           nb::arg("offsets"), nb::arg("columns"), nb::arg("halves").none() = nb::none(),
           nb::arg("floats").none() = nb::none());
  nb::class_<Matrix>(m, "Matrix")
      .def_static("packed", &packed, nb::arg("codes"), nb::arg("bits"), nb::arg("group_size"),
                  nb::arg("along_outputs"), nb::arg("scale"), nb::arg("zero"),
                  nb::arg("order").none(), nb::arg("outliers").none(), nb::arg("pool"),
                  nb::arg("sizes").none() = nb::none())
      .def_static("from_half", &from_half, nb::arg("values"), nb::arg("pool"))
      .def_static("from_float", &from_float, nb::arg("values"), nb::arg("pool"))
      .def_prop_ro("rows", &Matrix::rows)
      .def_prop_ro("columns", &Matrix::columns)
      .def_prop_ro("nbytes", &Matrix::nbytes)
      .def("decode", &decode, nb::arg("first"), nb::arg("out"), nb::arg("pool"))
      .def("decode_bfloat16", &decode_bfloat16, nb::arg("first"), nb::arg("out"), nb::arg("pool"));
  m.def("multiply", &multiply, nb::arg("matrices"), nb::arg("x"), nb::arg("ys"), nb::arg("exact"),
        nb::arg("pool"));
  m.def("multiply_grouped", &multiply_grouped, nb::arg("experts"), nb::arg("x"), nb::arg("counts"),
        nb::arg("ys"), nb::arg("exact"), nb::arg("pool"));
  m.def("has_bfloat16", &quantine::has_bfloat16);
  m.def("levels", &quantine::levels);
  m.def("level", &quantine::level);
  m.def("use_level", &quantine::use_level, nb::arg("name"));
}
