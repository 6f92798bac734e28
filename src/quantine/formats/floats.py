"""Float tensors that are not quantized, as an output directory stores them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.core.device import for_float64
from quantine.errors import FormatError

SHARE: Final = 2.0**-11
"""Share of its norm by which a row or a column may change when it is stored: what float16 rounds
off a number that is not too small for it."""
NEGLIGIBLE: Final = 2.0**-21
"""Norm of a row or column, as a share of the largest in its matrix, below which it may change by
more, as it does not matter beside the others."""
AT_ONCE: Final = 2**20
"""Numbers that are compared at once, in whole rows, which bounds temporary memory."""


def as_stored(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A float tensor that is not quantized, as the output stores it.

    A float32 matrix becomes float16 where float16 holds it: nothing overflows, and no row or column
    changes by more than `SHARE` of its norm, but for those that are `NEGLIGIBLE`. Vectors keep
    their dtype.

    Args:
        name: of the tensor, for the error.
        dtype: what every float becomes, where the readers of a format need that, see
            `quantine.formats.format.Format.float_dtype`.

    Raises:
        FormatError: ``tensor`` overflows in ``dtype``, or as a whole changes by more than `SHARE`,
            but has to be stored so.
    """
    if dtype is not None and tensor.is_floating_point():
        stored = tensor.to(dtype)
        if not bool(torch.isfinite(stored).all()):
            raise FormatError(
                f"{name} reaches {tensor.abs().max().item():.4g}, but the plan's format needs "
                f"every float in {dtype} (at most {torch.finfo(dtype).max:g}): use format sparse"
            )
        change, size = (float(_squares(of, tensor)[0].sum()) for of in (stored, None))
        if change > SHARE**2 * size:
            raise FormatError(
                f"{name} reaches only {tensor.abs().max().item():.2g}, but the plan's format needs "
                f"every float in {dtype}, which changes it by {(change / size) ** 0.5:.1%}: use "
                "format sparse"
            )
        return stored
    if tensor.ndim < 2 or tensor.dtype not in {torch.float32, torch.float64}:
        return tensor
    half = tensor.half()
    return half if _holds(half, tensor) else tensor.float()


def as_asked(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A float tensor in the dtype that a user asked for, rounded as far as that needs.

    Raises:
        FormatError: ``tensor``, of the name ``name``, overflows in ``dtype``.
    """
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        spelled = str(dtype).removeprefix("torch.")
        raise FormatError(
            f"{name} reaches {tensor.abs().max().item():.4g}, but {spelled} ends at "
            f"{torch.finfo(dtype).max:.4g}: ask for another dtype"
        )
    return stored


def _holds(stored: Tensor, tensor: Tensor) -> bool:
    """Whether ``stored`` is near enough to ``tensor``, row by row and column by column."""
    changes, sizes = _squares(stored, tensor), _squares(None, tensor)
    return all(
        bool(((change <= SHARE**2 * size) | (size <= NEGLIGIBLE**2 * size.max())).all())
        for change, size in zip(changes, sizes, strict=True)
    )


def _squares(stored: Tensor | None, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares of rows and of columns: of ``tensor``, or of what ``stored`` lacks of it."""
    matrix = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    other = None if stored is None else stored.reshape(matrix.shape)
    matrix = for_float64(matrix)
    other = None if other is None else for_float64(other)
    # One tensor for all rows: small ones made in between would keep freed memory in pieces.
    rows = torch.empty(len(matrix), dtype=torch.float64, device=matrix.device)
    columns = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    step = max(1, AT_ONCE // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        part = slice(start, start + step)
        values = matrix[part].double()
        square = (values if other is None else values - other[part]).square()
        rows[part] = square.sum(1)
        columns += square.sum(0)
    return rows, columns
