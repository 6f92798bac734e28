// Python bindings: check dtype, shape and contiguity, then call. No arithmetic here.
#include "bindings.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>
#include <utility>

#include "bits.h"
#include "columns.h"
#include "fit.h"
#if defined(QUANTINE_AMX)
#include "gram.h"
#endif

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
bool is(const Array<T>& matrix, std::size_t rows, std::size_t columns) {
  return matrix.shape(0) == rows && matrix.shape(1) == columns;
}

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

// The arrays of a quantine::Statistic of all groups.
struct Statistics {
  Array<float> values;
  Array<std::uint8_t> codes;
  Array<float> step, zero;

  void check(std::size_t groups, std::size_t rows, std::size_t run) const {
    const std::size_t runs = (rows + run - 1) / run;
    if (!is(values, groups, rows) || !is(codes, groups, rows) || !is(step, groups, runs) ||
        !is(zero, groups, runs))
      throw nb::value_error("statistics must be [groups, rows], of second grids [groups, runs]");
  }
  quantine::Statistic first() const {
    return {values.data(), codes.data(), step.data(), zero.data()};
  }
};

// A quantine::Fitter that keeps its arrays alive.
struct Fitter {
  quantine::FitRequest request;
  Vector<const float> spread;
  std::size_t length;
  bool of_columns;
  Statistics scale, zero;

  // Of a matrix whose columns are fitted one by one: groups of `length` outputs are the rows.
  quantine::Fitter checked_columns(std::size_t inputs, std::size_t outputs) const {
    if (length == 0 || outputs % length != 0 || spread.shape(0) != inputs || request.run != 1)
      throw nb::value_error("groups must tile the outputs, in runs of one; spread must be [inputs]");
    const std::size_t rows = outputs / length;
    scale.check(inputs, rows, 1);
    zero.check(inputs, rows, 1);
    return {request, of_columns, spread.data(), length, rows, scale.first(), zero.first()};
  }

  quantine::Fitter checked(std::size_t inputs, std::size_t rows) const {
    if (length == 0 || inputs % length != 0 || spread.shape(0) != (of_columns ? rows : inputs))
      throw nb::value_error("groups must tile the inputs; spread must be [inputs], or [rows] of "
                            "columns");
    scale.check(inputs / length, rows, request.run);
    zero.check(inputs / length, rows, request.run);
    return {request, of_columns, spread.data(), length, scale.step.shape(1), scale.first(), zero.first()};
  }
};

using Report = std::optional<std::pair<std::string, float>>;

Report reported(const quantine::Misfit& misfit) {
  if (misfit.kind == quantine::Misfit::kNone) return std::nullopt;
  const bool is_scale = misfit.kind == quantine::Misfit::kScale;
  return std::pair{std::string(is_scale ? "scale" : "statistic"), misfit.value};
}

Report fit_groups(Array<const float> columns, const Fitter& arrays, quantine::Pool& pool) {
  const std::size_t inputs = columns.shape(0), rows = columns.shape(1);
  const quantine::Fitter fitter = arrays.checked(inputs, rows);
  nb::gil_scoped_release release;
  return reported(quantine::fit_groups(fitter, columns.data(), inputs, rows, pool));
}

Report round_block(Array<float> weights, Array<const float> upper,
                   Vector<const std::int64_t> groups, Array<const float> scales,
                   Array<const float> zeros, Array<std::uint8_t> codes, Array<float> errors,
                   std::optional<Array<std::uint8_t>> kept, int bits, float price,
                   std::size_t start, std::size_t stop, const Fitter* arrays,
                   quantine::Pool& pool) {
  const std::size_t inputs = weights.shape(0), rows = weights.shape(1);
  if (bits < 1 || bits > 8) throw nb::value_error("bits must be 1 to 8");
  if (!is(upper, inputs, inputs) || groups.shape(0) != inputs || !is(codes, inputs, rows) ||
      !is(errors, inputs, rows) || (kept && !is(*kept, inputs, rows)) || start > stop ||
      stop > inputs || scales.shape(1) != rows || !is(zeros, scales.shape(0), rows))
    throw nb::value_error("upper must be [inputs, inputs], groups [inputs], grids [groups, rows], "
                          "everything else [inputs, rows]");
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
                                  price};
  nb::gil_scoped_release release;
  return reported(quantine::round_block(columns, start, stop, fitter ? &*fitter : nullptr, pool));
}

#if defined(QUANTINE_AMX)
void add_gram(Array<const std::int16_t> x, Array<float> total, quantine::Pool& pool) {
  if (!quantine::multiplies_tiles()) throw nb::value_error("this processor multiplies no tiles");
  if (!is(total, x.shape(1), x.shape(1))) throw nb::value_error("total must be [inputs, inputs]");
  nb::gil_scoped_release release;
  quantine::add_gram(reinterpret_cast<const std::uint16_t*>(x.data()), x.shape(0), x.shape(1),
                     total.data(), pool);
}

bool multiplies_tiles() { return quantine::multiplies_tiles(); }
#else
bool multiplies_tiles() { return false; }
#endif

}  // namespace

NB_MODULE(_native, m) {
  // The pool of threads lives as long as the process: that is no leak.
  nb::set_leak_warnings(false);
  m.doc() = "quantine's native kernels; called through quantine.kernels only.";
  m.def("pack_bits", &pack_bits, nb::arg("codes"), nb::arg("packed"), nb::arg("bits"));
  m.def("unpack_bits", &unpack_bits, nb::arg("packed"), nb::arg("codes"), nb::arg("bits"));
  nb::class_<Fitter>(m, "Fitter")
      .def(
          "__init__",
          [](Fitter* self, int bits, bool symmetric, int scale_bits, int zero_bits,
             std::size_t run, const std::string& clip, float price, bool look_ahead,
             bool given, std::size_t length, bool of_columns, Vector<const float> spread, Array<float> scales,
             Array<std::uint8_t> scale_codes, Array<float> scale_step, Array<float> scale_zero,
             Array<float> zeros, Array<std::uint8_t> zero_codes, Array<float> zero_step,
             Array<float> zero_zero) {
            new (self) Fitter{
                request(bits, symmetric, scale_bits, zero_bits, run, clip, price, look_ahead, given),
                spread,
                length,
                of_columns,
                {scales, scale_codes, scale_step, scale_zero},
                {zeros, zero_codes, zero_step, zero_zero}};
          });
  m.def("fit_groups", &fit_groups, nb::arg("columns"), nb::arg("fitter"),
        nb::arg("pool"));
  m.def("round_block", &round_block, nb::arg("weights"), nb::arg("upper"), nb::arg("groups"),
        nb::arg("scales"), nb::arg("zeros"), nb::arg("codes"), nb::arg("errors"),
        nb::arg("kept").none(), nb::arg("bits"), nb::arg("price"), nb::arg("start"),
        nb::arg("stop"), nb::arg("fitter").none(), nb::arg("pool"));
  m.def("multiplies_tiles", &multiplies_tiles);
  bind_matrix(m);
  bind_integer(m);
#if defined(QUANTINE_AMX)
  m.def("add_gram", &add_gram, nb::arg("x"), nb::arg("total"), nb::arg("pool"));
#endif
  bind_decoder(m);
  bind_kv_attention(m);
}
