"""A scheme: how one matrix is quantized, as a value and as plain values."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Final

from quantine.core.spec import FLOAT16, QuantSpec
from quantine.errors import PlanError
from quantine.families.layers import Layer
from quantine.formats import format_named
from quantine.formats.format import Format
from quantine.methods import METHODS
from quantine.methods.solver import Solver
from quantine.methods.spqr import LARGEST_SHARE, SpQR

KEEP: Final = "keep"
"""The method of a rule that leaves its layers in 16 bit."""
INFINITE: Final = "inf"
"""How plans write an infinite number."""
AVERAGE: Final = "average_bits"
"""How plans call `Scheme.average_bits`."""
SHARE_STEPS: Final = 40
"""Bisections that find a share of outliers to the last outlier of any matrix."""


@dataclass(frozen=True)
class Scheme:
    """How one matrix is quantized: solver, weight request, and packed layout.

    Attributes:
        average_bits: of `SpQR`: packed bits per weight that outliers fill up. How many that are
            differs from layer to layer, see `settled`; it is met as closely as the solver meets
            a share of outliers, within some percent of them. Zero leaves it to the solver.
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
                f"{AVERAGE} must be above 0 and at most {FLOAT16}, not {self.average_bits!r}"
            )

    @property
    def method(self) -> str:
        """The solver's name in `METHODS`."""
        return next(name for name, kind in METHODS.items() if type(self.solver) is kind)

    @property
    def layout(self) -> Format:
        """The packed layout."""
        return format_named(self.format)

    def as_dict(self) -> dict[str, Any]:
        """Everything about the scheme, as plain values; `scheme_from` inverts it."""
        spec = dataclasses.asdict(self.spec)
        if not self.spec.cluster_sizes:
            del spec["cluster_sizes"]
        return {
            "method": self.method,
            **spec,
            **{name: _plain(item) for name, item in dataclasses.asdict(self.solver).items()},  # type: ignore[call-overload]
            "format": self.format,
            **({AVERAGE: self.average_bits} if self.average_bits else {}),
        }

    def settled(self, layer: Layer) -> Scheme:
        """The scheme for ``layer``: with the share of outliers that ``average_bits`` has room for.

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
        assert isinstance(self.solver, SpQR)
        threshold = self.solver.threshold if share else math.inf
        solver = dataclasses.replace(self.solver, outliers=share, threshold=threshold)
        return dataclasses.replace(self, solver=solver, average_bits=0.0)

    def tiles(self, layer: Layer) -> bool:
        """Whether groups tile the lines of ``layer`` exactly."""
        return self.spec.divides(self.spec.lines(layer.out_features, layer.in_features)[1])

    def nbytes(self, layer: Layer) -> int:
        """Packed bytes of ``layer``; outliers that a threshold decides about come on top."""
        return self.expected_nbytes(layer, self.solver.outlier_share or 0.0)

    def expected_nbytes(self, layer: Layer, outlier_share: float) -> int:
        """Packed bytes of ``layer`` with that share of its weights kept as outliers."""
        return self.layout.nbytes(
            self.spec,
            layer.out_features,
            layer.in_features,
            self.solver.stores_order(self.spec),
            outlier_share,
        )

    def without_outliers(self) -> Scheme:
        """The scheme of method spqr that keeps no outliers."""
        return self._keeping(0.0)


def _plain(item: object) -> object:
    """``item`` as JSON has it, which knows no infinity."""
    return INFINITE if item == math.inf else item
