"""The layouts ``sparse`` and ``dense``: codes of one width, grids, and what else there is.

Byte by byte in docs/format.md. ``sparse`` has statistics on second grids, and outliers. ``dense``
is the part of it without these, under a name of its own for readers that know only this part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.spec import FLOAT16, QuantSpec
from quantine.errors import FormatError
from quantine.formats.description import METHOD, Description, own_config
from quantine.formats.layout import (
    Layout,
    check_finite,
    check_groups,
    check_layout,
    check_scales,
    index_dtype,
    nbytes_of,
    read_order,
)
from quantine.formats.outliers import GAP_TYPES, decode_gaps, encode_gaps, expected_bytes
from quantine.kernels.bits import pack, unpack
from quantine.kernels.bits.reference import packed_bytes

ALL_NAMES: Final = (
    "codes",
    "scale",
    "scale_step",
    "scale_zero",
    "zero",
    "zero_step",
    "zero_zero",
    "outlier_gap",
    "outlier_value",
    "in_perm",
    "exponent",
)
"""Every tensor that the layout ``sparse`` may have."""
PLAIN_NAMES: Final = ("codes", "scale", "zero", "in_perm", "exponent")
"""Every tensor that the layout ``dense`` may have."""

LEAST_EXPONENT: Final = -126
"""Smallest exponent of small weights: that of the smallest normal float32."""


@dataclass(frozen=True)
class Sparse:
    """Codes of one width; scales and zero points in 16 bit or as codes; outliers.

    Tensors: ``codes`` uint8 ``[out, bytes]``; ``scale`` and ``zero`` float16 ``[lines, groups]``,
    or uint8 ``[groups, bytes]`` codes with ``scale_step`` and ``scale_zero`` (``zero_step`` and
    ``zero_zero``) float16 ``[groups, tiles]``; whole zero points uint8 ``[bytes]``, only of
    asymmetric grids; ``outlier_gap`` uint8 or int16 ``[items]`` and ``outlier_value`` float16
    ``[entries]``; ``in_perm`` int16 or int32 ``[in]``, only where columns are stored in another
    order than the inputs'; ``exponent`` int8 ``[1]``, only where weights are too small for float16
    and so stored as multiples.

    Attributes:
        plain: the layout ``dense``, with scales in float16, whole zero points, and no outliers.
    """

    plain: bool = False
    quant_method: ClassVar[str] = METHOD
    writable: ClassVar[bool] = True
    exclusive: ClassVar[bool] = False
    linears_only: ClassVar[bool] = False
    holds_bias: ClassVar[bool] = True
    float_dtype: ClassVar[None] = None

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of every tensor the layout may have."""
        return PLAIN_NAMES if self.plain else ALL_NAMES

    def required(self, spec: QuantSpec, out_features: int, in_features: int) -> tuple[str, ...]:
        """Codes, and whatever grids of ``spec`` consist of; no outliers and no order."""
        return tuple(self.layout(spec, out_features, in_features, stores_order=False))

    @property
    def holds_statistics_as_codes(self) -> bool:
        """Whether scales and zero points may be codes of second grids."""
        return not self.plain

    def config(self, described: Description) -> dict[str, Any]:
        """Fields of ``config.json`` that `quantine.runtime.hf` reads."""
        return own_config(described)

    def supports(self, spec: QuantSpec, outliers: bool) -> bool:
        """Everything but signs and minima; in ``dense`` no second grids and no outliers either."""
        if spec.blocked:
            return False
        plain = spec.scale_bits == FLOAT16 and not spec.zero_bits and not outliers
        return plain or not self.plain

    def refusal(self, spec: QuantSpec, out_features: int, in_features: int) -> str | None:
        """Nothing is refused: any shape fits."""
        return None

    def pack(self, qtensor: QTensor) -> dict[str, Tensor]:
        """The tensors of the layout, without loss.

        Raises:
            FormatError: outliers come from a layout that holds them more precisely than float16;
                or ``dense`` is given outliers or statistics on second grids.
        """
        grid = qtensor.grid
        if self.plain and not _is_plain(qtensor):
            raise FormatError(
                "the dense layout holds neither outliers nor second-level statistics: use sparse"
            )
        tensors = {"codes": pack(qtensor.codes, grid.bits), **_pack_statistic("scale", grid.scale)}
        if isinstance(grid.zero_point, Tensor) and grid.zero_point.dtype == torch.uint8:
            tensors["zero"] = pack(grid.zero_point.reshape(1, -1), grid.bits).view(-1)
        elif grid.zero_point is not None:
            tensors.update(_pack_statistic("zero", grid.zero_point))
        if qtensor.outliers is not None:
            tensors["outlier_gap"] = encode_gaps(qtensor.outliers)
            tensors["outlier_value"] = _pack_values(qtensor.outliers.values, grid.exponent)
        if qtensor.in_perm is not None:
            tensors["in_perm"] = qtensor.in_perm.to(index_dtype(qtensor.codes.shape[1]))
        if grid.exponent:
            tensors["exponent"] = qtensor.codes.new_tensor([grid.exponent], dtype=torch.int8)
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
        codes = tensors.get("codes")
        out_features = codes.shape[0] if codes is not None and codes.ndim else 0
        self._check_layout(tensors, spec, out_features, in_features)
        kept = None
        if "outlier_gap" in tensors:
            shape = (out_features, in_features)
            values = _unpack_values(tensors["outlier_value"], _exponent(tensors))
            kept = decode_gaps(tensors["outlier_gap"], values, shape)
        grid = _unpack_grid(tensors, spec, out_features, in_features)
        packed = tensors["codes"]
        if rows is not None:
            packed, grid = packed[rows], grid.rows(rows)
            kept = None if kept is None else kept.rows(rows)
        in_perm = read_order(tensors["in_perm"]) if "in_perm" in tensors else None
        return QTensor(unpack(packed, spec.bits, in_features), grid, in_perm, kept)

    def check(
        self, tensors: dict[str, Tensor], spec: QuantSpec, out_features: int, in_features: int
    ) -> None:
        """See `quantine.formats.format.Format.check`."""
        self._check_layout(tensors, spec, out_features, in_features)
        for key, tensor in tensors.items():
            if key == "scale" and spec.scale_bits == FLOAT16:
                check_scales(key, tensor)
            elif tensor.dtype == torch.float16:
                check_finite(key, tensor)
        if "outlier_gap" in tensors:
            shape = (out_features, in_features)
            decode_gaps(tensors["outlier_gap"], tensors["outlier_value"], shape)
        if "in_perm" in tensors:
            read_order(tensors["in_perm"])
        if not LEAST_EXPONENT <= _exponent(tensors) <= 0:
            raise FormatError(
                f"exponent is {_exponent(tensors)}: damaged, it lies from {LEAST_EXPONENT} to 0"
            )

    def nbytes(
        self,
        spec: QuantSpec,
        out_features: int,
        in_features: int,
        stores_order: bool,
        outlier_share: float = 0.0,
    ) -> int:
        """Bytes of all tensors; exact without outliers and ``exponent``."""
        fixed = nbytes_of(self.layout(spec, out_features, in_features, stores_order))
        kept = out_features * in_features * outlier_share
        return fixed + math.ceil(kept * expected_bytes(outlier_share))

    def _check_layout(
        self, tensors: dict[str, Tensor], spec: QuantSpec, out_features: int, in_features: int
    ) -> None:
        """Refuse other tensors, shapes and dtypes than those of a matrix ``[out, in]``."""
        check_groups(spec, out_features, in_features)
        expected = self.layout(spec, out_features, in_features, "in_perm" in tensors)
        if "exponent" in tensors:
            expected["exponent"] = ((1,), torch.int8)
        outliers = {} if self.plain else _outlier_tensors(tensors)
        check_layout("dense" if self.plain else "sparse", tensors, {**expected, **outliers}, spec)

    def layout(
        self, spec: QuantSpec, out_features: int, in_features: int, stores_order: bool
    ) -> Layout:
        """Shapes and dtypes of all tensors of a matrix ``[out, in]`` but those of its outliers.

        Args:
            stores_order: whether columns are stored in another order than the inputs'.
        """
        lines, length = spec.lines(out_features, in_features)
        groups = spec.groups(length)
        layout: Layout = {
            "codes": ((out_features, packed_bytes(in_features, spec.bits)), torch.uint8),
            **_statistic_layout("scale", spec.scale_bits, spec, lines, groups),
        }
        if spec.zero_bits:
            layout.update(_statistic_layout("zero", spec.zero_bits, spec, lines, groups))
        elif not spec.sym:
            layout["zero"] = ((packed_bytes(lines * groups, spec.bits),), torch.uint8)
        if stores_order:
            layout["in_perm"] = ((in_features,), index_dtype(in_features))
        return layout


def _is_plain(qtensor: QTensor) -> bool:
    """Whether ``dense`` holds it: scales in float16, whole zero points, and no outliers."""
    scale, zero = qtensor.grid.scale, qtensor.grid.zero_point
    whole = zero is None or (isinstance(zero, Tensor) and zero.dtype == torch.uint8)
    return qtensor.outliers is None and isinstance(scale, Tensor) and whole


def _statistic_layout(name: str, bits: int, spec: QuantSpec, lines: int, groups: int) -> Layout:
    """Shapes and dtypes of the scales or zero points ``name``, each stored in so many ``bits``."""
    if bits == FLOAT16:
        return {name: ((lines, groups), torch.float16)}
    tiles = -(-lines // spec.stat_group_length(lines))
    return {
        name: ((groups, packed_bytes(lines, bits)), torch.uint8),
        f"{name}_step": ((groups, tiles), torch.float16),
        f"{name}_zero": ((groups, tiles), torch.float16),
    }


def _pack_statistic(name: str, stored: Tensor | Statistic) -> dict[str, Tensor]:
    """The tensors of the scales or zero points ``name``: one in float16, or codes and a grid."""
    if isinstance(stored, Tensor):
        return {name: stored.contiguous()}
    grid = stored.grid
    assert isinstance(grid.scale, Tensor)
    assert isinstance(grid.zero_point, Tensor)
    return {
        name: pack(stored.codes, grid.bits),
        f"{name}_step": grid.scale.contiguous(),
        f"{name}_zero": grid.zero_point.contiguous(),
    }


def _unpack_grid(
    tensors: dict[str, Tensor], spec: QuantSpec, out_features: int, in_features: int
) -> Grid:
    """The grid whose parts `Sparse.pack` stored, for a matrix ``[out, in]`` of ``spec``."""
    lines, length = spec.lines(out_features, in_features)

    def statistic(name: str, bits: int) -> Tensor | Statistic:
        if bits == FLOAT16:
            return tensors[name]
        tile = spec.stat_group_length(lines)
        second = Grid(tensors[f"{name}_step"], tensors[f"{name}_zero"], bits, tile)
        return Statistic(unpack(tensors[name], bits, lines), second)

    zero: Tensor | Statistic | None = None
    if spec.zero_bits:
        zero = statistic("zero", spec.zero_bits)
    elif not spec.sym:
        groups = spec.groups(length)
        stream = tensors["zero"].view(1, -1)
        zero = unpack(stream, spec.bits, lines * groups).view(lines, groups)
    scale = statistic("scale", spec.scale_bits)
    length = spec.group_length(length)
    return Grid(
        scale, zero, spec.bits, length, spec.group_axis, spec.cluster_sizes, _exponent(tensors)
    )


def _exponent(tensors: dict[str, Tensor]) -> int:
    return int(tensors["exponent"]) if "exponent" in tensors else 0


def _pack_values(values: Tensor, exponent: int) -> Tensor:
    """Values of outliers in float16, divided by ``2**exponent``.

    Raises:
        FormatError: they have more digits.
    """
    stored = (values.float() * 2.0**-exponent).half()
    if not torch.equal(_unpack_values(stored, exponent).float(), values.float()):
        raise FormatError("the sparse layout holds outliers in float16 only: keep their layout")
    return stored


def _unpack_values(stored: Tensor, exponent: int) -> Tensor:
    """Invert `_pack_values`: float16, or float32 where there is an exponent."""
    return stored.float() * 2.0**exponent if exponent else stored


def _outlier_tensors(tensors: dict[str, Tensor]) -> Layout:
    """Expected shapes of outliers, if there are any: their number is what the file says."""
    if not {"outlier_gap", "outlier_value"} & set(tensors):
        return {}
    gap, value = tensors.get("outlier_gap"), tensors.get("outlier_value")
    if gap is None or value is None or gap.dtype not in GAP_TYPES:
        raise FormatError("outlier_gap (uint8 or int16) and outlier_value belong together")
    return {
        "outlier_gap": ((gap.numel(),), gap.dtype),
        "outlier_value": ((value.numel(),), torch.float16),
    }
