"""The layout ``ggml``: matrices as the blocks that GGUF files have of them, in the model's order.

Byte by byte in docs/format.md, section "ggml".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError
from quantine.formats.description import METHOD, Description, own_config
from quantine.formats.foreign.gguf.grid_types import GRID_TYPES, GridType, type_of
from quantine.formats.layout import Layout, check_layout, nbytes_of


@dataclass(frozen=True)
class Blocks:
    """One tensor ``blocks`` uint8 ``[out, bytes]``: row after row as ggml packs its type.

    The spec says which type: those of `quantine.formats.foreign.gguf.grid_types.GRID_TYPES`
    are held.
    """

    quant_method: ClassVar[str] = METHOD
    tensor_names: ClassVar[tuple[str, ...]] = ("blocks",)
    writable: ClassVar[bool] = True
    exclusive: ClassVar[bool] = False
    linears_only: ClassVar[bool] = False
    holds_bias: ClassVar[bool] = True
    holds_statistics_as_codes: ClassVar[bool] = True
    float_dtype: ClassVar[None] = None

    def required(self, spec: QuantSpec, out_features: int, in_features: int) -> tuple[str, ...]:
        """The one tensor there is."""
        return self.tensor_names

    def config(self, described: Description) -> dict[str, Any]:
        """Fields of ``config.json`` that `quantine.runtime.hf` reads."""
        return own_config(described)

    def supports(self, spec: QuantSpec, outliers: bool) -> bool:
        """Whether ``spec`` is the grid of a type; there is no room for outliers."""
        return type_of(spec) is not None and not outliers

    def refusal(self, spec: QuantSpec, out_features: int, in_features: int) -> str | None:
        """Rows must be whole blocks."""
        kind = _type(spec)
        if in_features % kind.weights:
            return (
                f"{kind.name} has blocks of {kind.weights} inputs, which do not divide "
                f"{in_features}: give this layer another type"
            )
        return None

    def pack(self, qtensor: QTensor) -> dict[str, Tensor]:
        """The tensor of the layout, without loss.

        Raises:
            FormatError: the matrix has outliers, an order, or an exponent, for which there is no
                room; or is on no type's grid.
        """
        if qtensor.outliers is not None or qtensor.in_perm is not None or qtensor.grid.exponent:
            raise FormatError("the ggml layout holds no outliers, orders and exponents: use sparse")
        for kind in GRID_TYPES.values():
            if kind.holds(qtensor):
                return {"blocks": kind.encode(qtensor)}
        raise FormatError("the ggml layout holds the grids of ggml's types only: use sparse")

    def unpack(
        self,
        tensors: dict[str, Tensor],
        spec: QuantSpec,
        in_features: int,
        rows: Tensor | None = None,
    ) -> QTensor:
        """Unpack all rows, or those of the int64 indices ``rows``.

        Raises:
            FormatError: the tensor is missing, or its shape or dtype is not what ``spec`` implies.
        """
        blocks = tensors.get("blocks")
        out_features = blocks.shape[0] if blocks is not None and blocks.ndim else 0
        self._check_layout(tensors, spec, out_features, in_features)
        data = tensors["blocks"]
        return _type(spec).decode(data if rows is None else data[rows])

    def check(
        self, tensors: dict[str, Tensor], spec: QuantSpec, out_features: int, in_features: int
    ) -> None:
        """See `quantine.formats.format.Format.check`."""
        self._check_layout(tensors, spec, out_features, in_features)
        _type(spec).check_statistics(tensors["blocks"])

    def nbytes(
        self,
        spec: QuantSpec,
        out_features: int,
        in_features: int,
        stores_order: bool,
        outlier_share: float = 0.0,
    ) -> int:
        """Bytes of the tensor, exact."""
        return nbytes_of(_layout(spec, out_features, in_features))

    def _check_layout(
        self, tensors: dict[str, Tensor], spec: QuantSpec, out_features: int, in_features: int
    ) -> None:
        reason = self.refusal(spec, out_features, in_features)
        if reason is not None:
            raise FormatError(reason)
        check_layout("ggml", tensors, _layout(spec, out_features, in_features), spec)


def _type(spec: QuantSpec) -> GridType:
    kind = type_of(spec)
    if kind is None:
        raise FormatError(f"layout ggml holds the grids of ggml's types only, not {spec}")
    return kind


def _layout(spec: QuantSpec, out_features: int, in_features: int) -> Layout:
    kind = _type(spec)
    width = -(-in_features // kind.weights) * kind.nbytes
    return {"blocks": ((out_features, width), torch.uint8)}
