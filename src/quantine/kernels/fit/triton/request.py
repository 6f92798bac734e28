"""What a program on a GPU is asked to fit, and how it shares out lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import triton
from torch import Tensor

from quantine.core.spec import FLOAT16, QuantSpec
from quantine.kernels.fit.fitted import FittedGroups
from quantine.kernels.fit.grid_cost import Clip, GridCost
from quantine.kernels.fit.reference import SHRINKS, farthest_of

LEAST_LINES: Final = 16
"""Lines of a program, at least, where registers hold as many."""
LARGEST_TILE: Final = 2**12
"""Most places of a tile of the column loop, which is held in registers. PyTorch fits what takes
more."""
NARROW: Final = 16
"""Length of a group up to which a thread can hold it whole, and a warp needs no other."""
OF_A_WARP: Final = (1024, 512)
"""Places of a tile that one warp holds: up to `NARROW`, and where groups are longer."""


@dataclass(frozen=True)
class Request:
    """How groups are fitted; a constant of a program.

    Attributes:
        sym, scale_bits, zero_bits: as in `QuantSpec`.
        farthest: `quantine.kernels.fit.reference.farthest_of`; ``None`` for whole zero points.
        clip: as in `GridCost`.
        look_ahead: whether ranges leave out likely outliers.
        given: whether second grids were fitted before.
        bits: number of bits of one code.
        shrinks: number of ranges that are tried.
    """

    sym: bool
    scale_bits: int
    zero_bits: int
    farthest: float | None
    clip: Clip
    look_ahead: bool
    given: bool
    bits: int
    shrinks: int = len(SHRINKS)

    @classmethod
    def of(cls, fitted: FittedGroups, cost: GridCost) -> Request:
        """The request to fit all groups of ``fitted`` by ``cost``."""
        spec = fitted.spec
        return cls(
            spec.sym,
            spec.scale_bits,
            spec.zero_bits,
            farthest_of(spec, cost.clip) if spec.zero_bits else None,
            cost.clip,
            cost.leaves_out and fitted.length > 1,
            fitted.given,
            spec.bits,
        )

    @property
    def scale_top(self) -> int:
        """Largest code of a scale on its second grid; 0 where it has none."""
        return 0 if self.scale_bits == FLOAT16 else (1 << self.scale_bits) - 1

    @property
    def zero_coded(self) -> bool:
        """Whether zero points are codes of second grids."""
        return self.zero_bits not in {0, FLOAT16}

    @property
    def zero_top(self) -> int:
        """Largest code of a zero point, or largest whole one; 0 where there is no choice."""
        if self.zero_coded:
            return (1 << self.zero_bits) - 1
        return 0 if self.sym or self.zero_bits else (1 << self.bits) - 1

    @property
    def refines(self) -> bool:
        """Whether neighbouring codes of scales and zero points are tried."""
        return (self.scale_top > 0 or self.zero_coded) and self.clip != "minmax"


@dataclass(frozen=True)
class Share:
    """The lines of one program, and the warps that work on them.

    Attributes:
        runs, span, run: a program has ``runs`` runs of ``run`` lines that stay together, each
            filled up to ``span`` places, a power of two.
        warps: number of its warps.
    """

    runs: int
    span: int
    run: int
    warps: int

    @classmethod
    def of(cls, run: int, length: int, most: int = LARGEST_TILE) -> Share | None:
        """The share of lines that stay together in runs of ``run``, in groups of ``length``.

        ``None`` if such a run takes more than ``most`` places.
        """
        span, width = int(triton.next_power_of_2(run)), int(triton.next_power_of_2(length))
        runs = max(1, min(LEAST_LINES, most // width) // span)
        tile = runs * span * width
        if tile > most:
            return None
        return cls(runs, span, run, max(1, tile // OF_A_WARP[length > NARROW]))

    def programs(self, lines: int) -> int:
        """Number of programs for so many lines."""
        return -(-lines // (self.runs * self.run))


def run_of(spec: QuantSpec, run: int, most: int = LEAST_LINES) -> int:
    """Number of lines that one program must hold: the ``run`` of a second level, or any.

    Args:
        spec, run: how lines are fitted.
        most: lines that registers hold.
    """
    return run if spec.second_level else max(1, min(LEAST_LINES, most))


def operands(fitted: FittedGroups) -> tuple[Tensor, ...]:
    """What a program writes of a group's grid, in the order of its parameters."""
    scale, zero = fitted.scale, fitted.zero
    levels = [(one.values, one.codes, one.step, one.zero) for one in (scale, zero)]
    return (*levels[0], *levels[1], fitted.misfits)
