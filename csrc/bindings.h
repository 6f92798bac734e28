// What the bindings of all stems share: arrays as they come from Python, and the functions that
// module.cpp calls, one for each stem. Bindings check dtype, shape and contiguity, release the
// interpreter lock, and call; they do no arithmetic.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>

namespace nb = nanobind;

template <typename T>
using Array = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
bool has_shape(const Array<T>& matrix, std::size_t rows, std::size_t columns) {
  return matrix.shape(0) == rows && matrix.shape(1) == columns;
}

void bind_base(nb::module_& m);
void bind_bits(nb::module_& m);
void bind_columns(nb::module_& m);
void bind_decoder(nb::module_& m);
void bind_fit(nb::module_& m);
void bind_gram(nb::module_& m);
void bind_integer(nb::module_& m);
void bind_kv_attention(nb::module_& m);
void bind_matrix(nb::module_& m);
