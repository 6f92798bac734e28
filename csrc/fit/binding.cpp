// Python bindings of fitting the grids of groups.
#include "fit/binding.h"

#include <cstdint>
#include <string>

namespace {

quantine::FitRequest request(int bits, bool symmetric, int scale_bits, int zero_bits,
                             std::size_t run, const std::string& clip, float price,
                             bool look_ahead, bool given) {
  const auto is_width = [](int width) { return width == 16 || (width >= 1 && width <= 8); };
  if (bits < 1 || bits > 8) throw nb::value_error("bits must be 1 to 8");
  if (!is_width(scale_bits) || (zero_bits != 0 && !is_width(zero_bits)))
    throw nb::value_error("scale_bits must be 1 to 8 or 16; zero_bits likewise, or 0");
  if (run == 0) throw nb::value_error("run must be positive");
  if (clip != "minmax" && clip != "mse" && clip != "hessian")
    throw nb::value_error("clip must be minmax, mse or hessian");
  const quantine::Clip cost = clip == "minmax" ? quantine::Clip::kMinMax
                              : clip == "mse"  ? quantine::Clip::kPower
                                               : quantine::Clip::kHessian;
  return {bits, symmetric, scale_bits, zero_bits, run, cost, price, look_ahead, given};
}

Report fit_groups(Array<const float> columns, const FitterArrays& arrays, quantine::Pool& pool) {
  const std::size_t inputs = columns.shape(0), rows = columns.shape(1);
  const quantine::Fitter fitter = arrays.checked(inputs, rows);
  nb::gil_scoped_release release;
  return reported(quantine::fit_groups(fitter, columns.data(), inputs, rows, pool));
}

}  // namespace

void bind_fit(nb::module_& m) {
  nb::class_<FitterArrays>(m, "Fitter")
      .def(
          "__init__",
          [](FitterArrays* self, int bits, bool symmetric, int scale_bits, int zero_bits,
             std::size_t run, const std::string& clip, float price, bool look_ahead, bool given,
             std::size_t length, bool of_columns, Vector<const float> spread, Array<float> scales,
             Array<std::uint8_t> scale_codes, Array<float> scale_step, Array<float> scale_zero,
             Array<float> zeros, Array<std::uint8_t> zero_codes, Array<float> zero_step,
             Array<float> zero_zero) {
            new (self) FitterArrays{request(bits, symmetric, scale_bits, zero_bits, run, clip,
                                            price, look_ahead, given),
                                    spread,
                                    length,
                                    of_columns,
                                    {scales, scale_codes, scale_step, scale_zero},
                                    {zeros, zero_codes, zero_step, zero_zero}};
          });
  m.def("fit_groups", &fit_groups, nb::arg("columns"), nb::arg("fitter"), nb::arg("pool"));
}
