"""A quantized matrix whose numbers a gradient may change.

They are scales, zero points that are not integers, the second grids of SpQR's statistics (arXiv
2306.03078), values of outliers and, for a while, codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.tuning.numbers import OUTLIER_RATE, Codes, Numbers

CODES: Final = "codes"
"""What codes are called among the numbers of a matrix."""
APART: Final = 0.3
"""How far from its code a float begins at most: it is a code by a margin of 0.2, which noise of a
few steps does not cross."""


class TunedMatrix:
    """A quantized matrix whose numbers a gradient may change; its codes only where they are freed.

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

    @property
    def codes(self) -> Tensor:
        """``[out, in]`` uint8, columns in stored order: those that it has while none are freed."""
        return self._start.codes

    def replace_codes(self, codes: Tensor) -> None:
        """Let the matrix have other codes, of the same shape and dtype."""
        self._start = replace(self._start, codes=codes)

    def free_codes(self, weight: Tensor | None) -> None:
        """Let codes change, too, until `hold_codes`.

        Args:
            weight: the weight ``[out, in]`` that codes were rounded from; ``None`` where that is
                not known, and all codes are as far from their neighbours.
        """
        start, grid = self._start, self._start.grid
        if weight is None:
            exact = start.codes.float()
            self.numbers[CODES] = Codes.near(start.codes, exact, 2**grid.bits - 1, APART)
            return
        stored = weight.float()
        if start.in_perm is not None:
            stored = stored[:, start.in_perm]
        zero = grid.decode(torch.zeros_like(start.codes))
        step = grid.decode(torch.ones_like(start.codes)) - zero
        wanted = (stored - zero) / step
        # The scale of a group may be 0: its codes mean nothing, and stay.
        wanted = torch.where(step == 0, start.codes, wanted)
        self.numbers[CODES] = Codes.near(start.codes, wanted, 2**grid.bits - 1, APART)

    def hold_codes(self) -> None:
        """Let codes stay as they are now."""
        self.replace_codes(self.numbers.pop(CODES).stored())

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
        codes = value(self.numbers[CODES]) if CODES in self.numbers else self._start.codes
        return replace(self._start, codes=codes, grid=changed, outliers=kept)

    def _statistic(
        self, name: str, stored: Tensor | Statistic | None, value: Callable[[Numbers], Tensor]
    ) -> Tensor | Statistic | None:
        if isinstance(stored, Statistic):
            second = replace(stored.grid, scale=value(self.numbers[f"{name}.step"]))
            if f"{name}.zero" in self.numbers:
                second = replace(second, zero_point=value(self.numbers[f"{name}.zero"]))
            return Statistic(stored.codes, second)
        return value(self.numbers[name]) if name in self.numbers else stored
