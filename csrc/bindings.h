#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

namespace nb = nanobind;

template <typename T>
using Array = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void bind_matrix(nb::module_& m);
void bind_decoder(nb::module_& m);
void bind_kv_attention(nb::module_& m);
void bind_integer(nb::module_& m);
