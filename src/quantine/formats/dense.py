"""The ``dense`` layout: bit-packed codes, float16 scales, bit-packed zero points.

Byte by byte in docs/format.md, section "dense".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantine.core.bits import packed_bytes
from quantine.core.grid import Grid
from quantine.core.qtensor import QTensor
from quantine.core.spec import FLOAT16, QuantSpec
from quantine.errors import FormatError
from quantine.formats.layout import Layout, check_layout, index_dtype, nbytes_of, read_order
from quantine.kernels.bits import pack, unpack


@dataclass(frozen=True)
class Dense:
    """Codes of one width, grids over consecutive stored columns, an optional input order.

    Tensors: ``codes`` uint8 ``[out, bytes]``; ``scale`` float16 ``[out, groups]``; ``zero`` uint8
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
        grid = qtensor.grid
        scale, zero = grid.scale, grid.zero_point
        whole = zero is None or (isinstance(zero, Tensor) and zero.dtype == torch.uint8)
        if qtensor.outliers is not None or not isinstance(scale, Tensor) or not whole:
            raise FormatError(
                "the dense layout holds neither outliers nor second-level statistics: use sparse"
            )
        tensors = {"codes": pack(qtensor.codes, grid.bits), "scale": scale.contiguous()}
        if isinstance(zero, Tensor):
            tensors["zero"] = pack(zero.reshape(1, -1), grid.bits).view(-1)
        if qtensor.in_perm is not None:
            tensors["in_perm"] = qtensor.in_perm.to(index_dtype(qtensor.codes.shape[1]))
        return tensors

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
        expected = self._layout(spec, out_features, in_features, "in_perm" in tensors)
        check_layout("dense", tensors, expected, spec)
        packed, scale, zero = tensors["codes"], tensors["scale"], None
        if not spec.sym:
            stream = tensors["zero"].view(1, -1)
            zero = unpack(stream, spec.bits, scale.numel()).view(scale.shape)
        if rows is not None:
            packed, scale = packed[rows], scale[rows]
            zero = None if zero is None else zero[rows]
        grid = Grid(scale, zero, spec.bits, spec.group_length(in_features))
        in_perm = read_order(tensors["in_perm"]) if "in_perm" in tensors else None
        return QTensor(unpack(packed, spec.bits, in_features), grid, in_perm)

    def nbytes(
        self,
        spec: QuantSpec,
        out_features: int,
        in_features: int,
        stores_order: bool,
        outlier_share: float = 0.0,
    ) -> int:
        """Bytes of all tensors."""
        return nbytes_of(self._layout(spec, out_features, in_features, stores_order))

    def _layout(
        self, spec: QuantSpec, out_features: int, in_features: int, stores_order: bool
    ) -> Layout:
        groups = in_features // spec.group_length(in_features)
        layout: Layout = {
            "codes": ((out_features, packed_bytes(in_features, spec.bits)), torch.uint8),
            "scale": ((out_features, groups), torch.float16),
        }
        if not spec.sym:
            layout["zero"] = ((packed_bytes(out_features * groups, spec.bits),), torch.uint8)
        if stores_order:
            layout["in_perm"] = ((in_features,), index_dtype(in_features))
        return layout
