"""Shapes and dtypes that the tensors of a packed matrix must have, and checks of them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.core.spec import QuantSpec
from quantine.errors import FormatError

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of every tensor by name."""

LARGEST_INT16_INDEX: Final = 2**15
"""Most inputs whose order is stored in int16."""


def check_layout(name: str, tensors: dict[str, Tensor], expected: Layout, spec: QuantSpec) -> None:
    """Refuse tensors that are not what the layout ``name`` makes of ``spec``.

    Raises:
        FormatError: shows both.
    """
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    if found != expected:
        raise FormatError(f"{name} tensors are {found}, but {spec} implies {expected}")


def nbytes_of(layout: Layout) -> int:
    """Bytes of all tensors of ``layout`` together."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.values())


def index_dtype(in_features: int) -> torch.dtype:
    """Dtype of a stored order of so many inputs: the smallest signed one that has every index."""
    return torch.int16 if in_features <= LARGEST_INT16_INDEX else torch.int32


def read_order(stored: Tensor) -> Tensor:
    """A stored input order ``[in]`` as int64.

    Raises:
        FormatError: it is not a permutation.
    """
    order = stored.long()
    in_range = int(order.min()) >= 0 and int(order.max()) < len(order)
    if not in_range or int(order.bincount().max()) != 1:
        raise FormatError("in_perm is damaged: it does not name every input once")
    return order
