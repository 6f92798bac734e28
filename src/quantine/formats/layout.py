"""Shapes and dtypes that the tensors of a packed matrix must have, and checks of them."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from quantine.core.finite import is_finite
from quantine.core.permute import is_order
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError, cut

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of every tensor by name."""

LARGEST_INT16_INDEX: Final = 2**15
"""Most inputs whose order is stored in int16."""
INFINITY: Final = 0x7C00
"""The bits of infinity in float16; those of positive numbers below it are smaller."""


def check_layout(name: str, tensors: dict[str, Tensor], expected: Layout, spec: QuantSpec) -> None:
    """Refuse tensors that are not what the layout ``name`` makes of ``spec``.

    Raises:
        FormatError: names the first that differs, and shows both.
    """
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    for key in sorted(found.keys() | expected.keys()):
        if found.get(key) != expected.get(key):
            raise FormatError(
                f"{key} is {_shown(found.get(key))}, but layout {name} with {spec.bits} bits in "
                f"groups of {spec.group_size} needs {_shown(expected.get(key))}"
            )


def check_groups(spec: QuantSpec, out_features: int, in_features: int) -> None:
    """Refuse a matrix ``[out, in]`` that does not consist of whole groups of ``spec``.

    Raises:
        FormatError: says which numbers do not fit.
    """
    _, length = spec.lines(out_features, in_features)
    total = sum(spec.cluster_sizes)
    if spec.clustered and total != length:
        raise FormatError(f"cluster_sizes sum to {cut(total)}, but there are {cut(length)} inputs")
    if not spec.divides(length):
        raise FormatError(f"groups of {cut(spec.group_size)} do not divide lines of {cut(length)}")


def check_scales(name: str, scales: Tensor) -> None:
    """Refuse float16 ``scales`` of weights that are not positive and finite.

    Raises:
        FormatError: names the tensor ``name`` and a value that must not be.
    """
    # As integers, since the bits of positive floats ascend with their values.
    low, high = scales.view(torch.int16).aminmax()
    if not (int(low) > 0 and int(high) < INFINITY):
        bad = scales[~((scales > 0) & torch.isfinite(scales))].flatten()[0]
        raise FormatError(f"{name} holds {float(bad):g}, but scales are positive and finite")


def check_finite(name: str, values: Tensor) -> None:
    """Refuse float ``values`` that are infinite or not a number.

    Raises:
        FormatError: names the tensor ``name`` and a value that must not be.
    """
    if values.numel() and not is_finite(values):
        bad = values[~torch.isfinite(values)].flatten()[0]
        raise FormatError(f"{name} holds {float(bad):g}, but its values are finite")


def nbytes_of(layout: Layout) -> int:
    """Bytes of all tensors of ``layout`` together."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


def index_dtype(in_features: int) -> torch.dtype:
    """Dtype of a stored order of so many inputs: the smallest signed one that has every index."""
    return torch.int16 if in_features <= LARGEST_INT16_INDEX else torch.int32


def read_order(stored: Tensor) -> Tensor:
    """A stored input order ``[in]`` as int64.

    Raises:
        FormatError: it is not a permutation.
    """
    if not is_order(stored):
        raise FormatError("in_perm is damaged: it does not name every input once")
    return stored.long()


def _shown(part: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "not there" if part is None else f"{part[1]} {list(part[0])}"
