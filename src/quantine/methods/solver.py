"""The protocol of a solver: a method that quantizes one weight matrix."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.kernels.fit.grid_cost import Clip
from quantine.statistics.hessian import Hessian


class Solver(Protocol):
    """A method that quantizes one matrix: a frozen dataclass whose fields are its parameters."""

    default_spec: ClassVar[QuantSpec]
    """The grid that a weight gets unless a plan asks for another one."""

    needs_inputs: ClassVar[bool]
    """Whether the solver needs the Hessian, and so calibration inputs."""

    def stores_order(self, spec: QuantSpec) -> bool:
        """Whether results for ``spec`` store an order of inputs, `QTensor.in_perm`."""
        ...

    @property
    def takes_clusters(self) -> bool:
        """Whether groups may be clusters of input channels, which differ in size."""
        ...

    @property
    def clip(self) -> Clip:
        """How the range of a group is chosen, see `quantine.kernels.fit.grid_cost.GridCost`."""
        ...

    @property
    def outlier_share(self) -> float | None:
        """Share of weights kept as outliers, 0 to 1; ``None`` if only solving tells."""
        ...

    def __call__(self, weight: Tensor, hessian: Hessian | None, spec: QuantSpec) -> QTensor:
        """Quantize one matrix on the grid that ``spec`` asks for.

        Args:
            weight: ``[out, in]`` float32; it is not modified.
            hessian: statistics of the matrix's input; ``None`` without calibration.
            spec: the grid to quantize on.

        Raises:
            SolverError: the matrix cannot be solved.
        """
        ...
