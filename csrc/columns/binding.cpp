// Python bindings of rounding columns with error feedback.
#include "columns/columns.h"

#include <cstdint>
#include <optional>

#include "bindings.h"
#include "fit/binding.h"

namespace {

Report round_block(Array<float> weights, Array<const float> upper,
                   Vector<const std::int64_t> groups, Array<const float> scales,
                   Array<const float> zeros, Array<std::uint8_t> codes, Array<float> errors,
                   std::optional<Array<std::uint8_t>> kept, int bits, float price,
                   std::optional<Array<const float>> coupling, std::size_t start,
                   std::size_t stop, const FitterArrays* arrays, quantine::Pool& pool) {
  const std::size_t inputs = weights.shape(0), rows = weights.shape(1);
  if (bits < 1 || bits > 8) throw nb::value_error("bits must be 1 to 8");
  if (!has_shape(upper, inputs, inputs) || groups.shape(0) != inputs ||
      !has_shape(codes, inputs, rows) || !has_shape(errors, inputs, rows) ||
      (kept && !has_shape(*kept, inputs, rows)) || start > stop || stop > inputs ||
      scales.shape(1) != rows || !has_shape(zeros, scales.shape(0), rows))
    throw nb::value_error("upper must be [inputs, inputs], groups [inputs], grids [groups, rows], "
                          "everything else [inputs, rows]");
  if (coupling && (coupling->shape(0) != rows || coupling->shape(1) < 1))
    throw nb::value_error("coupling must be [rows, run], run positive");
  for (std::size_t j = 0; j < inputs; ++j)
    if (groups(j) < 0 || static_cast<std::size_t>(groups(j)) >= scales.shape(0))
      throw nb::value_error("groups must be rows of scales");
  std::optional<quantine::Fitter> fitter;
  if (arrays != nullptr)
    fitter = arrays->of_columns ? arrays->checked_columns(inputs, rows)
                                : arrays->checked(inputs, rows);
  const quantine::Columns columns{weights.data(),
                                  upper.data(),
                                  groups.data(),
                                  scales.data(),
                                  zeros.data(),
                                  codes.data(),
                                  errors.data(),
                                  kept ? kept->data() : nullptr,
                                  inputs,
                                  rows,
                                  bits,
                                  price,
                                  coupling ? coupling->data() : nullptr,
                                  coupling ? coupling->shape(1) : 1};
  nb::gil_scoped_release release;
  return reported(quantine::round_block(columns, start, stop, fitter ? &*fitter : nullptr, pool));
}

}  // namespace

void bind_columns(nb::module_& m) {
  m.def("round_block", &round_block, nb::arg("weights"), nb::arg("upper"), nb::arg("groups"),
        nb::arg("scales"), nb::arg("zeros"), nb::arg("codes"), nb::arg("errors"),
        nb::arg("kept").none(), nb::arg("bits"), nb::arg("price"),
        nb::arg("coupling").none(), nb::arg("start"), nb::arg("stop"), nb::arg("fitter").none(),
        nb::arg("pool"));
}
