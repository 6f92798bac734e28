"""What a packed layout is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec


class Format(Protocol):
    """A packed layout of a `QTensor`: a set of named tensors, specified in docs/format.md."""

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of every tensor the layout may have."""
        ...

    def supports(self, spec: QuantSpec, outliers: bool) -> bool:
        """Whether the layout can hold what ``spec`` asks for, and ``outliers`` if there are."""
        ...

    def refusal(self, spec: QuantSpec, out_features: int, in_features: int) -> str | None:
        """Why a matrix of this shape cannot be held, and the remedy; ``None`` if it can."""
        ...

    def pack(self, qtensor: QTensor) -> dict[str, Tensor]:
        """The tensors of the layout; raises `FormatError` for what it cannot hold.

        Nothing is dropped; a layout that rounds says so, and `unpack` gives what it really holds.
        """
        ...

    def unpack(
        self,
        tensors: dict[str, Tensor],
        spec: QuantSpec,
        in_features: int,
        rows: Tensor | None = None,
    ) -> QTensor:
        """What `pack` stored, bit for bit, for all rows or those of the int64 indices ``rows``.

        Raises `FormatError` for tensors that do not fit ``spec``.
        """
        ...

    def nbytes(
        self,
        spec: QuantSpec,
        out_features: int,
        in_features: int,
        stores_order: bool,
        outlier_share: float = 0.0,
    ) -> int:
        """Bytes of the packed tensors: exact without outliers, else an estimate."""
        ...
