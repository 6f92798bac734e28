"""What a solver is."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.kernels.fit.grid_cost import Clip
from quantine.statistics.hessian import Hessian


class Solver(Protocol):
    """A frozen dataclass whose fields are the method's parameters."""

    default_spec: ClassVar[QuantSpec]
    """What is asked of a weight unless a plan says otherwise."""

    needs_inputs: ClassVar[bool]
    """Whether the solver cannot work without a Hessian."""

    def stores_order(self, spec: QuantSpec) -> bool:
        """Whether results for ``spec`` carry an input order (`QTensor.in_perm`)."""
        ...

    @property
    def takes_clusters(self) -> bool:
        """Whether groups may be clusters of inputs, which differ in size."""
        ...

    @property
    def clip(self) -> Clip:
        """How the range of a group is chosen."""
        ...

    @property
    def outlier_share(self) -> float | None:
        """Share of weights that results keep as outliers; ``None`` if known only afterwards."""
        ...

    def __call__(self, weight: Tensor, hessian: Hessian | None, spec: QuantSpec) -> QTensor:
        """Round ``weight`` ``[out, in]`` float32, which is left untouched."""
        ...
