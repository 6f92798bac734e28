"""Float tensors that are not quantized, as an output directory stores them."""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.core.fit_range import LARGEST_SCALE
from quantine.errors import FormatError


def as_stored(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A float tensor that is not quantized, as the output stores it.

    A float32 matrix becomes float16 unless it overflows there; vectors keep their dtype.

    Args:
        name: of the tensor, for the error.
        dtype: what every float becomes, where the readers of a format need that, see
            `quantine.formats.format.Format.float_dtype`.

    Raises:
        FormatError: ``tensor`` overflows in ``dtype``, but has to be stored so.
    """
    if dtype is not None and tensor.is_floating_point():
        stored = tensor.to(dtype)
        if not bool(torch.isfinite(stored).all()):
            raise FormatError(
                f"{name} reaches {tensor.abs().max().item():.4g}, but the plan's format needs "
                f"every float in {dtype} (at most {torch.finfo(dtype).max:g}): use format sparse"
            )
        return stored
    if tensor.ndim < 2 or tensor.dtype not in {torch.float32, torch.float64}:
        return tensor
    low, high = tensor.aminmax()
    fits = float(low) >= -LARGEST_SCALE and float(high) <= LARGEST_SCALE
    return tensor.half() if fits else tensor.float()
