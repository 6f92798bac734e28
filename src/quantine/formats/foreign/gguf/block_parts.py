"""The numbers in blocks of GGUF files, and the `QTensor` that they are.

Every type of ggml's that is a grid of quantine's has codes and one float16 ``d``. Types with minima
have a second float16, K types codes of scales (and minima) that these multiply.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.spec import FLOAT16, QuantSpec


@dataclass(frozen=True)
class Parts:
    """Some blocks of one type.

    Attributes:
        codes: ``[blocks, weights]`` uint8.
        scale: ``[blocks]`` float16.
        minimum: ``[blocks]`` float16, what is subtracted; ``None`` where codes have a middle.
        scale_codes: ``[blocks, groups]`` uint8, which ``scale`` multiplies; ``None`` where it is
            the scale of the whole block.
        minimum_codes: the same of minima.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor | None = None
    scale_codes: Tensor | None = None
    minimum_codes: Tensor | None = None

    def coded(self) -> tuple[Tensor, ...]:
        """The codes of scales, and of minima if there are any."""
        return tuple(one for one in (self.scale_codes, self.minimum_codes) if one is not None)

    def least(self) -> Tensor:
        """The minima, of a type that has some."""
        assert self.minimum is not None
        return self.minimum


def as_bytes(halves: Tensor) -> Tensor:
    """``[blocks]`` float16 as ``[blocks, 2]`` uint8."""
    return halves.reshape(-1, 1).contiguous().view(torch.uint8)


def as_halves(data: Tensor) -> Tensor:
    """Invert `as_bytes`."""
    return data.contiguous().view(torch.float16).flatten()


def parts_of(qtensor: QTensor, weights: int) -> Parts:
    """The blocks of a matrix, row after row, each of so many ``weights``."""
    grid = qtensor.grid
    scale, scale_codes = _stored(grid.scale)
    minimum, minimum_codes = (None, None) if grid.minimum is None else _stored(grid.minimum)
    groups = weights // grid.group_size
    return Parts(
        qtensor.codes.reshape(-1, weights),
        scale.flatten(),
        None if minimum is None else minimum.flatten(),
        None if scale_codes is None else scale_codes.reshape(-1, groups),
        None if minimum_codes is None else minimum_codes.reshape(-1, groups),
    )


def qtensor_of(parts: Parts, rows: int, spec: QuantSpec) -> QTensor:
    """Invert `parts_of`, for a matrix of so many ``rows`` on the grid of ``spec``."""
    scale = _statistic(parts.scale, parts.scale_codes, rows, spec, spec.scale_bits)
    minimum = None
    if parts.minimum is not None:
        minimum = _statistic(parts.minimum, parts.minimum_codes, rows, spec, spec.zero_bits)
    grid = Grid(scale, None, spec.bits, spec.group_size, minimum=minimum)
    return QTensor(parts.codes.reshape(rows, -1), grid)


def _stored(statistic: Tensor | Statistic) -> tuple[Tensor, Tensor | None]:
    """Float16 ``[lines, blocks]`` and codes ``[lines, groups]``, if there are any."""
    if isinstance(statistic, Tensor):
        return statistic, None
    assert isinstance(statistic.grid.scale, Tensor)
    return statistic.grid.scale, statistic.codes.T


def _statistic(
    halves: Tensor, codes: Tensor | None, rows: int, spec: QuantSpec, bits: int
) -> Tensor | Statistic:
    if bits == FLOAT16 or codes is None:
        return halves.reshape(rows, -1)
    of_lines = codes.reshape(rows, -1).T.contiguous()
    run = spec.stat_group_size
    return Statistic.along_lines(of_lines, halves.reshape(rows, -1), bits, run, spec.sym)
