"""The ``dense`` layout: bit-packed codes, float16 scales, bit-packed zero points.

Byte by byte in docs/format.md, section "dense". It is the part of ``sparse`` without outliers and
second grids, under a name of its own for readers that know only this part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.spec import FLOAT16, QuantSpec
from quantine.errors import FormatError
from quantine.formats.layout import check_layout
from quantine.formats.sparse import Sparse


@dataclass(frozen=True)
class Dense:
    """Codes of one width, grids over runs of each line, an optional input order.

    Tensors: ``codes`` uint8 ``[out, bytes]``; ``scale`` float16 ``[lines, groups]``; ``zero`` uint8
    ``[bytes]``, only of asymmetric grids; ``in_perm`` int16 or int32 ``[in]``, only where columns
    are stored in another order than the inputs'.
    """

    tensor_names: tuple[str, ...] = ("codes", "scale", "zero", "in_perm")

    def supports(self, spec: QuantSpec, outliers: bool) -> bool:
        """Scales in float16, whole zero points, and no outliers."""
        return spec.scale_bits == FLOAT16 and not spec.zero_bits and not outliers

    def refusal(self, spec: QuantSpec, out_features: int, in_features: int) -> str | None:
        """Any shape fits."""
        return None

    def pack(self, qtensor: QTensor) -> dict[str, Tensor]:
        """Pack; lossless.

        Raises:
            FormatError: the result has outliers or statistics on second grids.
        """
        scale, zero = qtensor.grid.scale, qtensor.grid.zero_point
        whole = zero is None or (isinstance(zero, Tensor) and zero.dtype == torch.uint8)
        if qtensor.outliers is not None or not isinstance(scale, Tensor) or not whole:
            raise FormatError(
                "the dense layout holds neither outliers nor second-level statistics: use sparse"
            )
        return Sparse().pack(qtensor)

    def unpack(
        self,
        tensors: dict[str, Tensor],
        spec: QuantSpec,
        in_features: int,
        rows: Tensor | None = None,
    ) -> QTensor:
        """Unpack all rows, or those of the int64 indices ``rows``.

        Raises:
            FormatError: a tensor is missing, or its shape or dtype is not what ``spec`` implies.
        """
        out_features = tensors["codes"].shape[0] if "codes" in tensors else 0
        expected = Sparse().layout(spec, out_features, in_features, "in_perm" in tensors)
        check_layout("dense", tensors, expected, spec)
        return Sparse().unpack(tensors, spec, in_features, rows)

    def nbytes(
        self,
        spec: QuantSpec,
        out_features: int,
        in_features: int,
        stores_order: bool,
        outlier_share: float = 0.0,
    ) -> int:
        """Bytes of all tensors."""
        return Sparse().nbytes(spec, out_features, in_features, stores_order)
