"""`Scheme`: how one matrix is quantized and packed."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Final

from quantine.core.spec import FLOAT16, QuantSpec
from quantine.errors import PlanError, shown
from quantine.families.layers import Layer
from quantine.formats import format_named
from quantine.formats.format import Format
from quantine.methods import METHODS
from quantine.methods.solver import Solver
from quantine.methods.spqr import LARGEST_SHARE, SpQR

KEEP: Final = "keep"
"""Name of the method of a rule that keeps its layers in 16 bit."""
INFINITE: Final = "inf"
"""Text for an infinite number in plans, as JSON has none."""
AVERAGE: Final = "average_bits"
"""Name of `Scheme.average_bits` in plans."""
SWEEPS: Final = "sweeps"
"""Name of the solvers' field of that name in plans."""
SHARE_STEPS: Final = 40
"""Number of bisections of the share of outliers: enough to find it to the last outlier of any
matrix."""


@dataclass(frozen=True)
class Scheme:
    """How one matrix is quantized: method, grid, and packed layout.

    Attributes:
        solver: the method with its parameters.
        spec: the grid to quantize on.
        format: name of the packed layout, in `quantine.formats.FORMATS`.
        average_bits: for method ``spqr`` only: packed bits per weight that are to be filled up with
            outliers. Their share then differs from layer to layer, see `settled`; the size is met
            as closely as the solver meets a share of outliers, within some percent of them. 0
            leaves outliers to the solver.

    Raises:
        PlanError: ``average_bits`` is out of range or does not go with the solver.
    """

    solver: Solver
    spec: QuantSpec
    format: str = "dense"
    average_bits: float = 0.0

    def __post_init__(self) -> None:
        if not self.average_bits:
            return
        if not isinstance(self.solver, SpQR) or self.solver.outliers:
            raise PlanError(f"{AVERAGE} is for method spqr without `outliers`, which would decide")
        if not 0 < self.average_bits <= FLOAT16:
            raise PlanError(
                f"{AVERAGE} must be above 0 and at most {FLOAT16}, not {shown(self.average_bits)}"
            )

    @property
    def method(self) -> str:
        """The name of the solver's method in `METHODS`."""
        return next(name for name, kind in METHODS.items() if type(self.solver) is kind)

    @property
    def layout(self) -> Format:
        """The packed layout that ``format`` names."""
        return format_named(self.format)

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values; `quantine.plan.scheme_parsing.scheme_from` inverts it.

        Without `SWEEPS` where there are none, so that runs of plans from before it go on.
        """
        solver = {name: _plain(item) for name, item in vars(self.solver).items()}
        if not solver.get(SWEEPS):
            solver.pop(SWEEPS, None)
        return {
            "method": self.method,
            **self.spec.as_dict(),
            **solver,
            "format": self.format,
            **({AVERAGE: self.average_bits} if self.average_bits else {}),
        }

    def settled(self, layer: Layer) -> Scheme:
        """The scheme for ``layer``, with ``average_bits`` turned into a share of outliers.

        Unchanged where ``average_bits`` is 0 or groups do not divide the layer.

        Raises:
            PlanError: the layer takes more bits even without outliers, or so few that more than
                `LARGEST_SHARE` of its weights would be outliers.
        """
        if not self.average_bits or not self.tiles(layer):
            return self
        room = layer.weights * self.average_bits / 8
        dense, fullest = (self._keeping(share).nbytes(layer) for share in (0.0, LARGEST_SHARE))
        if not dense <= room <= fullest:
            raise PlanError(
                f"{layer.name}: {AVERAGE} must be from {dense * 8 / layer.weights:.3f} (no "
                f"outliers) to {fullest * 8 / layer.weights:.3f} with these bits and groups, not "
                f"{self.average_bits:g}"
            )
        low, high = 0.0, LARGEST_SHARE
        for _ in range(SHARE_STEPS):
            share = (low + high) / 2
            low, high = (
                (share, high) if self._keeping(share).nbytes(layer) <= room else (low, share)
            )
        return self._keeping(low)

    def _keeping(self, share: float) -> Scheme:
        """The same scheme, of method ``spqr``, with a fixed ``share`` of outliers."""
        assert isinstance(self.solver, SpQR)
        threshold = self.solver.threshold if share else math.inf
        solver = dataclasses.replace(self.solver, outliers=share, threshold=threshold)
        return dataclasses.replace(self, solver=solver, average_bits=0.0)

    def tiles(self, layer: Layer) -> bool:
        """Whether the lines of ``layer`` consist of whole groups."""
        return self.spec.divides(self.spec.lines(layer.out_features, layer.in_features)[1])

    def nbytes(self, layer: Layer) -> int:
        """Packed bytes of ``layer``, without the outliers whose number a threshold decides."""
        return self.expected_nbytes(layer, self.solver.outlier_share or 0.0)

    def expected_nbytes(self, layer: Layer, outlier_share: float) -> int:
        """Packed bytes of ``layer`` if ``outlier_share`` (0 to 1) of its weights are outliers."""
        return self.layout.nbytes(
            self.spec,
            layer.out_features,
            layer.in_features,
            self.solver.stores_order(self.spec),
            outlier_share,
        )

    def without_outliers(self) -> Scheme:
        """The same scheme, of method ``spqr``, but without outliers."""
        return self._keeping(0.0)


def _plain(item: object) -> object:
    """``item`` as plans write it: JSON has no infinity, so that becomes `INFINITE`."""
    return INFINITE if item == math.inf else item
