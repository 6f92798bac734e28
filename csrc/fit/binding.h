// A fitter and its reports as Python has them: the bindings of fit and of columns share them.
#pragma once

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "bindings.h"
#include "fit/fit.h"

// The arrays of a quantine::Statistic of all groups.
struct StatisticArrays {
  Array<float> values;
  Array<std::uint8_t> codes;
  Array<float> step, zero;

  void check(std::size_t groups, std::size_t rows, std::size_t run) const {
    const std::size_t runs = (rows + run - 1) / run;
    if (!has_shape(values, groups, rows) || !has_shape(codes, groups, rows) ||
        !has_shape(step, groups, runs) || !has_shape(zero, groups, runs))
      throw nb::value_error("statistics must be [groups, rows], of second grids [groups, runs]");
  }
  quantine::Statistic first() const {
    return {values.data(), codes.data(), step.data(), zero.data()};
  }
};

// A quantine::Fitter that keeps its arrays alive.
struct FitterArrays {
  quantine::FitRequest request;
  Vector<const float> spread;
  std::size_t length;
  bool of_columns;
  StatisticArrays scale, zero;

  // Of a matrix whose columns are fitted one by one: groups of `length` outputs are the rows.
  quantine::Fitter checked_columns(std::size_t inputs, std::size_t outputs) const {
    if (length == 0 || outputs % length != 0 || spread.shape(0) != inputs || request.run != 1)
      throw nb::value_error("groups must tile the outputs, in runs of one; spread must be "
                            "[inputs]");
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
    return {request,      of_columns,   spread.data(), length, scale.step.shape(1),
            scale.first(), zero.first()};
  }
};

// What does not fit into float16, and its value; none where a grid was found.
using Report = std::optional<std::pair<std::string, float>>;

inline Report reported(const quantine::Misfit& misfit) {
  if (misfit.kind == quantine::Misfit::kNone) return std::nullopt;
  const bool is_scale = misfit.kind == quantine::Misfit::kScale;
  return std::pair{std::string(is_scale ? "scale" : "statistic"), misfit.value};
}
