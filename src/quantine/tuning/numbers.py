"""The numbers of a quantized matrix, and of norms and biases, that a gradient may change.

Codes stay as they are. What changes are scales, zero points that are not integers, the second grids
of SpQR's statistics (arXiv 2306.03078), values of outliers, and float vectors. Each is stored in 16
bit or so, and a number is always used as it would be stored: gradients pass that rounding as if it
were not there. So what is tuned is what files will hold, but for a layout that stores outliers as
differences, which are rounded once more.

A number is moved in a unit of its own, so that one rate suits all: factors by shares of
themselves, zero points by codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr

ZERO_POINT_RATE: Final = 4.0
"""Codes that a zero point moves while a scale moves by the whole of itself."""
OUTLIER_RATE: Final = 2.0
"""Share by which an outlier changes, relative to that by which a scale does."""


@dataclass(frozen=True)
class Numbers:
    """Numbers of one kind, and how far they are from where they began.

    Attributes:
        start: the numbers at the beginning, in the dtype of files.
        moved: float32 leaf of the same shape, 0 at the beginning.
        unit: what one of ``moved`` means, float32 that broadcasts with ``start``.
    """

    start: Tensor
    moved: Tensor
    unit: Tensor

    @classmethod
    def factors(cls, start: Tensor, rate: float = 1.0) -> Numbers:
        """Numbers that change by shares of themselves."""
        return cls(start, _leaf(start), start.float() * rate)

    @classmethod
    def offsets(cls, start: Tensor, rate: float = ZERO_POINT_RATE) -> Numbers:
        """Numbers that change by ``rate`` each, whatever they are."""
        return cls(start, _leaf(start), torch.full_like(start, rate, dtype=torch.float32))

    @classmethod
    def vector(cls, start: Tensor) -> Numbers:
        """The weights of a norm, or biases: they change by shares of their mean magnitude."""
        unit = start.float().abs().mean().clamp(min=torch.finfo(torch.float32).tiny)
        return cls(start, _leaf(start), unit)

    def now(self) -> Tensor:
        """The numbers as files would hold them, float32; gradients reach `moved`."""
        exact = self.start.float() + self.moved * self.unit
        return exact + (exact.detach().to(self.start.dtype).float() - exact.detach())

    def stored(self) -> Tensor:
        """The numbers in the dtype of files."""
        return self.now().detach().to(self.start.dtype)


def _leaf(start: Tensor) -> Tensor:
    return torch.zeros(start.shape, dtype=torch.float32, device=start.device, requires_grad=True)


class TunedMatrix:
    """A quantized matrix whose numbers a gradient may change; codes stay.

    Args:
        qtensor: the matrix at the beginning.

    Attributes:
        numbers: its numbers that may change, by what they are.
    """

    def __init__(self, qtensor: QTensor) -> None:
        self._start = qtensor
        self.numbers: dict[str, Numbers] = {}
        grid = qtensor.grid
        for name, stored in (("scale", grid.scale), ("zero_point", grid.zero_point)):
            if isinstance(stored, Statistic):
                assert isinstance(stored.grid.scale, Tensor)
                self.numbers[f"{name}.step"] = Numbers.factors(stored.grid.scale)
                if isinstance(stored.grid.zero_point, Tensor):
                    self.numbers[f"{name}.zero"] = Numbers.offsets(stored.grid.zero_point)
            elif stored is not None and stored.is_floating_point():
                make: Callable[[Tensor], Numbers] = (
                    Numbers.factors if name == "scale" else Numbers.offsets
                )
                self.numbers[name] = make(stored)
        if qtensor.outliers is not None and qtensor.outliers.entries:
            self.numbers["outliers"] = Numbers.factors(qtensor.outliers.values, OUTLIER_RATE)

    def weight(self) -> Tensor:
        """The decoded matrix ``[out, in]`` float32; gradients reach the numbers."""
        return self._with(Numbers.now).dequantize()

    def qtensor(self) -> QTensor:
        """The matrix as it is now, with numbers as files hold them."""
        return self._with(Numbers.stored)

    def _with(self, value: Callable[[Numbers], Tensor]) -> QTensor:
        """The matrix with what ``value`` gives for each kind of numbers."""
        grid, kept = self._start.grid, self._start.outliers
        scale = self._statistic("scale", grid.scale, value)
        zero = self._statistic("zero_point", grid.zero_point, value)
        assert scale is not None
        if kept is not None and "outliers" in self.numbers:
            values = value(self.numbers["outliers"])
            kept = Csr(kept.row_offsets, kept.columns, values, kept.shape)
        changed: Grid = replace(grid, scale=scale, zero_point=zero)
        return replace(self._start, grid=changed, outliers=kept)

    def _statistic(
        self, name: str, stored: Tensor | Statistic | None, value: Callable[[Numbers], Tensor]
    ) -> Tensor | Statistic | None:
        if isinstance(stored, Statistic):
            second = replace(stored.grid, scale=value(self.numbers[f"{name}.step"]))
            if f"{name}.zero" in self.numbers:
                second = replace(second, zero_point=value(self.numbers[f"{name}.zero"]))
            return Statistic(stored.codes, second)
        return value(self.numbers[name]) if name in self.numbers else stored
