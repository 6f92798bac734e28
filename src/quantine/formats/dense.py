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
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError
from quantine.kernels.bits import pack, unpack

LARGEST_INT16_INDEX = 2**15


@dataclass(frozen=True)
class Dense:
    """Codes of one width, grids over consecutive stored columns, an optional input order.

    Tensors: ``codes`` uint8 ``[out, bytes]``; ``scale`` float16 ``[out, groups]``; ``zero`` uint8
    ``[bytes]``, only of asymmetric grids; ``in_perm`` int16 or int32 ``[in]``, only where columns
    are stored in another order than the inputs'.
    """

    tensor_names: tuple[str, ...] = ("codes", "scale", "zero", "in_perm")

    def supports(self, spec: QuantSpec) -> bool:
        """Every spec there is today."""
        return True

    def pack(self, qtensor: QTensor) -> dict[str, Tensor]:
        """Pack; lossless."""
        grid = qtensor.grid
        tensors = {"codes": pack(qtensor.codes, grid.bits), "scale": grid.scale.contiguous()}
        if grid.zero_point is not None:
            tensors["zero"] = pack(grid.zero_point.reshape(1, -1), grid.bits).view(-1)
        if qtensor.in_perm is not None:
            tensors["in_perm"] = qtensor.in_perm.to(_index_dtype(qtensor.codes.shape[1]))
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
        found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        if found != expected:
            raise FormatError(f"dense tensors are {found}, but {spec} implies {expected}")
        packed, scale, zero = tensors["codes"], tensors["scale"], None
        if not spec.sym:
            stream = tensors["zero"].view(1, -1)
            zero = unpack(stream, spec.bits, scale.numel()).view(scale.shape)
        if rows is not None:
            packed, scale = packed[rows], scale[rows]
            zero = None if zero is None else zero[rows]
        grid = Grid(scale, zero, spec.bits, spec.group_length(in_features))
        in_perm = _order(tensors["in_perm"]) if "in_perm" in tensors else None
        return QTensor(unpack(packed, spec.bits, in_features), grid, in_perm)

    def nbytes(
        self, spec: QuantSpec, out_features: int, in_features: int, stores_order: bool
    ) -> int:
        """Bytes of all tensors."""
        layout = self._layout(spec, out_features, in_features, stores_order)
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in layout.values())

    def _layout(
        self, spec: QuantSpec, out_features: int, in_features: int, stores_order: bool
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        groups = in_features // spec.group_length(in_features)
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((out_features, packed_bytes(in_features, spec.bits)), torch.uint8),
            "scale": ((out_features, groups), torch.float16),
        }
        if not spec.sym:
            layout["zero"] = ((packed_bytes(out_features * groups, spec.bits),), torch.uint8)
        if stores_order:
            layout["in_perm"] = ((in_features,), _index_dtype(in_features))
        return layout


def _order(stored: Tensor) -> Tensor:
    order = stored.long()
    in_range = int(order.min()) >= 0 and int(order.max()) < len(order)
    if not in_range or int(order.bincount().max()) != 1:
        raise FormatError("in_perm is damaged: it does not name every input once")
    return order


def _index_dtype(in_features: int) -> torch.dtype:
    return torch.int16 if in_features <= LARGEST_INT16_INDEX else torch.int32
