"""Numbers that a gradient may change, and what they are rounded to.

A number is always used as it would be stored: gradients pass that rounding as if it were not there
(a straight-through gradient). So what is tuned is what files will hold, but for a layout that
stores outliers as differences, which are rounded once more.

A number is moved in a unit of its own, so that one rate suits all: factors by shares of
themselves, zero points and codes by codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantine.core.straight_through import straight_through

ZERO_POINT_RATE: Final = 4.0
"""Codes that a zero point moves while a scale moves by the whole of itself."""
OUTLIER_RATE: Final = 2.0
"""Share by which an outlier changes, relative to that by which a scale does."""
CODE_RATE: Final = 7.5
"""Codes that a code moves, before it is rounded, while a scale moves by the whole of itself."""


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
        """The weights of a norm, or biases: they change by shares of their mean magnitude.

        Where all are 0, as biases may be and the weights of norms that add 1 to them are after a
        rotation, they change by shares of 1, which is what norms multiply by then.
        """
        magnitude = start.float().abs().mean()
        return cls(start, _leaf(start), torch.where(magnitude > 0, magnitude, 1.0))

    def now(self) -> Tensor:
        """The numbers as files would hold them, float32; gradients reach `moved`."""
        exact = self.start.float() + self.moved * self.unit
        return straight_through(exact, self._rounded(exact.detach()).float())

    def stored(self) -> Tensor:
        """The numbers in the dtype of files."""
        return self._rounded(self.now().detach())

    def _rounded(self, exact: Tensor) -> Tensor:
        return exact.to(self.start.dtype)


@dataclass(frozen=True)
class Codes(Numbers):
    """Codes that may change: floats that are rounded to codes.

    Attributes:
        largest: the largest code.
    """

    largest: int

    @classmethod
    def near(cls, codes: Tensor, wanted: Tensor, largest: int, apart: float) -> Codes:
        """Codes that begin as ``codes``; what is rounded to them is nearer to ``wanted``.

        Those that were rounded by a narrow margin are then the first to change.

        Args:
            codes: ``[out, in]`` uint8.
            wanted: float32 of the same shape, what would be rounded to the nearest codes.
            largest: the largest code.
            apart: how far from its code a float begins at most, below 0.5.
        """
        start = codes + (wanted - codes).clamp_(-apart, apart)
        return cls(start, _leaf(start), start.new_tensor(CODE_RATE), largest)

    def _rounded(self, exact: Tensor) -> Tensor:
        return exact.round().clamp_(0, self.largest).to(torch.uint8)


def _leaf(start: Tensor) -> Tensor:
    return torch.zeros(start.shape, dtype=torch.float32, device=start.device, requires_grad=True)
