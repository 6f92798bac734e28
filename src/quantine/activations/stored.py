"""Checks of the tensors with which activations are reordered and rounded, as files hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.core.finite import is_finite
from quantine.errors import FormatError


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse the stored tensor ``name`` if it has another dtype or shape, or is not finite.

    Raises:
        FormatError: shows what it is and what it must be.
    """
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise FormatError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, but the model needs {dtype} "
            f"{list(shape)}: it is damaged, or of another model"
        )
    if tensor.is_floating_point() and tensor.numel() and not is_finite(tensor):
        raise FormatError(f"{name} holds values that are not finite: it is damaged")


def check_within(name: str, tensor: Tensor, least: float, most: float) -> None:
    """Refuse the stored tensor ``name`` if it has values below ``least`` or above ``most``.

    Raises:
        FormatError: shows its smallest and largest value.
    """
    low, high = (float(end) for end in tensor.aminmax())
    if low < least or high > most:
        raise FormatError(
            f"{name} has values from {low:g} to {high:g}, but they lie from {least:g} to "
            f"{most:g}: it is damaged"
        )
