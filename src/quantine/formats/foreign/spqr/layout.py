"""The ``spqr`` layout: the tensors of a Hugging Face checkpoint with ``quant_method: spqr``.

It is the layout that the kernels of SpQR's authors read (github.com/Vahe1994/SpQR, inference_lib).
Byte by byte in docs/format.md, section "spqr".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from quantine.core.grid import Grid, Statistic, decode
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError, shown
from quantine.formats.description import Description
from quantine.formats.foreign.spqr.small_scales import regridded, without_exponent
from quantine.formats.foreign.spqr.words import (
    BITS,
    TILE,
    check_words,
    pack_words,
    unpack_words,
)
from quantine.formats.layout import Layout, check_layout, nbytes_of, read_order

SPEC: Final = QuantSpec(3, 16, scale_bits=3, zero_bits=3, stat_group_size=16)
"""The one spec the layout has room for."""
METHOD: Final = "spqr"
"""``quant_method`` of such directories."""
MARK: Final = "spqr_outliers"
"""A field of config.json itself: transformers keeps it there when it saves a configuration again,
but drops fields of ``quantization_config`` that it does not know."""
ADDED: Final = "added"
"""Value of the mark: stored outliers are differences. Without it they replace decoded codes."""
ARITHMETIC: Final = "quantine_arithmetic"
"""Another such field: the arithmetic of the plan."""
SIZES: Final = {"bits": BITS, "beta1": TILE, "beta2": TILE}
"""What every such directory says; ``beta1`` and ``beta2`` are rows and columns of a tile."""
LARGEST_WIDTH: Final = 32767
"""Most inputs: the authors' converter and kernel take the column of an outlier as a signed 16-bit
number, and turn its value into NaN beyond."""


@dataclass(frozen=True)
class Spqr:
    """3-bit codes in groups of 16, statistics of 3 bits on second grids of 16 outputs, outliers.

    Tensors: ``dense_weights`` int64 ``[out * in / 16]``; ``row_offsets`` int32 ``[out + 1]`` (CSR)
    or, only read, ``[out / 16 + 1]`` (PTCSR); ``col_vals`` int32 ``[entries]``; ``in_perm`` int32
    ``[in / 2]``, or ``[0]`` where columns are stored in input order.

    Attributes:
        added: a stored value is the difference from the decoded code under it, as the authors'
            kernel adds both. ``False`` is for reading checkpoints of the authors' converter, which
            stores the outliers themselves: their quantizer meant them to replace the code.
    """

    added: bool = True
    quant_method: ClassVar[str] = METHOD
    tensor_names: ClassVar[tuple[str, ...]] = (
        "dense_weights",
        "row_offsets",
        "col_vals",
        "in_perm",
    )
    exclusive: ClassVar[bool] = True
    linears_only: ClassVar[bool] = True
    holds_bias: ClassVar[bool] = False
    holds_statistics_as_codes: ClassVar[bool] = True
    float_dtype: ClassVar[torch.dtype] = torch.float16

    def required(self, spec: QuantSpec, out_features: int, in_features: int) -> tuple[str, ...]:
        """All of them: what a matrix does not have is stored as an empty tensor."""
        return self.tensor_names

    @property
    def writable(self) -> bool:
        """Nothing is written that the authors' kernel would misread: only differences are."""
        return self.added

    def config(self, described: Description) -> dict[str, Any]:
        """Fields of ``config.json`` that other readers of the layout need, and quantine's own."""
        shapes = {
            f"{name}.{key}.shape": shape[0]
            for name, tensors in described.packed.items()
            for key, shape in tensors.items()
        }
        # Older versions of transformers look for names of weights, newer ones for modules.
        kept = [
            spelling for name in described.kept_linears for spelling in (name, f"{name}.weight")
        ]
        settings = {
            "quant_method": METHOD,
            **SIZES,
            "modules_to_not_convert": kept,
            "shapes": shapes,
        }
        return {MARK: ADDED, ARITHMETIC: described.arithmetic, "quantization_config": settings}

    def supports(self, spec: QuantSpec, outliers: bool) -> bool:
        """Whether ``spec`` is the one that the words have room for, `SPEC`."""
        return spec == SPEC

    def refusal(self, spec: QuantSpec, out_features: int, in_features: int) -> str | None:
        """Why not: only whole tiles are stored, and columns that fit into 16 bits, signed."""
        for count, kind in ((out_features, "outputs"), (in_features, "inputs")):
            if count % TILE:
                return (
                    f"format spqr needs tiles of {TILE} outputs by {TILE} inputs, but {TILE} does "
                    f"not divide {count} {kind}: use format sparse, or keep the layer"
                )
        if in_features > LARGEST_WIDTH:
            return (
                f"format spqr has room for {LARGEST_WIDTH} inputs, not {in_features}: use format "
                "sparse, or keep the layer"
            )
        return None

    def pack(self, qtensor: QTensor) -> dict[str, Tensor]:
        """Pack; lossless but for outliers.

        Their difference from the decoded code is rounded to float16. ``pack(unpack(tensors))``
        gives the same tensors again, see `unpack`.

        Raises:
            FormatError: another shape or grid, too small weights, or an outlier far from its code.
        """
        grid, (rows, columns) = qtensor.grid, qtensor.codes.shape
        scale, zero = grid.scale, grid.zero_point
        reason = self.refusal(SPEC, rows, columns)
        if reason is not None:
            raise FormatError(f"a matrix of {rows} x {columns} does not fit: {reason}")
        if not (
            isinstance(scale, Statistic)
            and isinstance(zero, Statistic)
            and (grid.bits, grid.group_size) == (BITS, TILE)
            and (scale.grid.bits, scale.grid.group_size) == (BITS, TILE)
            and (zero.grid.bits, zero.grid.group_size) == (BITS, TILE)
        ):
            raise FormatError(f"the spqr layout holds only {SPEC}: use sparse")
        if grid.exponent:
            scale = without_exponent(scale, grid.exponent)
            qtensor = regridded(qtensor, replace(grid, scale=scale, exponent=0))
        return {
            "dense_weights": pack_words(qtensor.codes, scale, zero),
            **self._pack_outliers(qtensor),
            "in_perm": _pack_order(qtensor),
        }

    def unpack(
        self,
        tensors: dict[str, Tensor],
        spec: QuantSpec,
        in_features: int,
        rows: Tensor | None = None,
    ) -> QTensor:
        """Unpack all rows, or those of the int64 indices ``rows``.

        Where values are added, outliers are held in float32. That is exact, so that `pack` gives
        the stored value again, wherever the weight is below 0.5 in magnitude or the value at least
        ``2**-11`` of it; only the sign of a zero is lost.

        Raises:
            FormatError: a tensor is missing or damaged, or its shape or dtype is not what ``spec``
                implies.
        """
        words = tensors.get("dense_weights", torch.empty(0, dtype=torch.int64, device="cpu"))
        out_features = words.numel() * TILE // max(1, in_features)
        self._check_layout(tensors, spec, out_features, in_features)
        codes, grid = unpack_words(words, out_features, in_features)
        kept = self._unpack_outliers(tensors, codes, grid)
        in_perm = _unpack_order(tensors["in_perm"])
        if rows is not None:
            codes, grid = codes[rows], grid.rows(rows)
            kept = None if kept is None else kept.rows(rows)
        return QTensor(codes, grid, in_perm, kept)

    def check(
        self, tensors: dict[str, Tensor], spec: QuantSpec, out_features: int, in_features: int
    ) -> None:
        """See `quantine.formats.format.Format.check`."""
        self._check_layout(tensors, spec, out_features, in_features)
        check_words(tensors["dense_weights"])
        self._stored_outliers(tensors, out_features, in_features)
        _unpack_order(tensors["in_perm"])

    def _check_layout(
        self, tensors: dict[str, Tensor], spec: QuantSpec, out_features: int, in_features: int
    ) -> None:
        """Refuse other tensors, shapes and dtypes than those of a matrix ``[out, in]``."""
        for name, needed in vars(SPEC).items():
            if getattr(spec, name) != needed:
                found = shown(getattr(spec, name))
                raise FormatError(f"layout spqr needs {name} {needed}, not {found}")
        check_layout("spqr", tensors, _layout_like(tensors, out_features, in_features), spec)
        reason = self.refusal(spec, out_features, in_features)
        if reason is not None or not out_features:
            raise FormatError(
                f"spqr tensors cannot be {out_features} x {in_features}: {reason or 'empty'}"
            )

    def nbytes(
        self,
        spec: QuantSpec,
        out_features: int,
        in_features: int,
        stores_order: bool,
        outlier_share: float = 0.0,
    ) -> int:
        """Bytes of all tensors: exact where ``outlier_share`` is the share of stored outliers."""
        entries = round(out_features * in_features * outlier_share)
        return nbytes_of(layout_of(out_features, in_features, stores_order, entries))

    def _pack_outliers(self, qtensor: QTensor) -> dict[str, Tensor]:
        """``row_offsets`` and ``col_vals``: each entry a value above the column that it is in."""
        outliers = qtensor.outliers
        if outliers is None:
            offsets = qtensor.codes.new_zeros(len(qtensor.codes) + 1, dtype=torch.int32)
            return {"row_offsets": offsets, "col_vals": offsets.new_empty(0)}
        values = outliers.values.float()
        if self.added:
            values = values - _decoded_under(outliers, qtensor.codes, qtensor.grid)
        stored = values.half()
        if not bool(torch.isfinite(stored).all()):
            raise FormatError(
                f"an outlier is {values.abs().max().item():.4g} away from its decoded code, which "
                "float16 does not hold: use format sparse"
            )
        if self.added:
            stored = stored + 0.0  # takes the sign off a zero, which `unpack` could not give back
        bits = stored.view(torch.int16).to(torch.int32) << 16
        return {
            "row_offsets": outliers.row_offsets.to(torch.int32),
            "col_vals": bits | outliers.columns.to(torch.int32),
        }

    def _unpack_outliers(self, tensors: dict[str, Tensor], codes: Tensor, grid: Grid) -> Csr | None:
        """Invert `_pack_outliers`; ``codes`` and ``grid`` are what the outliers lie on."""
        outliers = self._stored_outliers(tensors, codes.shape[0], codes.shape[1])
        if outliers is None or not self.added:
            return outliers
        replaced = outliers.values.float() + _decoded_under(outliers, codes, grid)
        return Csr(outliers.row_offsets, outliers.columns, replaced, outliers.shape)

    def _stored_outliers(
        self, tensors: dict[str, Tensor], out_features: int, in_features: int
    ) -> Csr | None:
        """The places of outliers with the float16 values that are stored there."""
        words = tensors["col_vals"]
        offsets = tensors["row_offsets"]
        if not words.numel():
            if bool(offsets.any()):
                raise FormatError("row_offsets is damaged: it counts outliers, but there are none")
            return None
        offsets, words = _in_rows(offsets, words, out_features)
        columns, values = (words & 0xFFFF).long(), (words >> 16).to(torch.int16).view(torch.float16)
        outliers = Csr(offsets, columns, values, (out_features, in_features))
        places = outliers.row_indices() * in_features + columns
        ordered = bool((places.diff() > 0).all()) and bool((columns < in_features).all())
        if not ordered or not bool(torch.isfinite(values).all()):
            raise FormatError(
                "col_vals is damaged: columns do not ascend within rows, or values are not finite"
            )
        return outliers


def layout_of(out_features: int, in_features: int, stores_order: bool, entries: int) -> Layout:
    """Shapes and dtypes of all tensors of a matrix, which holds ``entries`` outliers, in CSR."""
    return {
        "dense_weights": ((out_features * in_features // TILE,), torch.int64),
        "row_offsets": ((out_features + 1,), torch.int32),
        "col_vals": ((entries,), torch.int32),
        "in_perm": ((in_features // 2 if stores_order else 0,), torch.int32),
    }


def _layout_like(tensors: dict[str, Tensor], out_features: int, in_features: int) -> Layout:
    """What ``tensors`` have to look like: some lengths say themselves what a file holds."""
    length = {key: tensor.numel() for key, tensor in tensors.items()}
    layout = layout_of(
        out_features, in_features, length.get("in_perm", 0) > 0, length.get("col_vals", 0)
    )
    if length.get("row_offsets") == out_features // TILE + 1:
        layout["row_offsets"] = ((out_features // TILE + 1,), torch.int32)
    if length.get("col_vals") == 0:  # the authors' converter makes these float32
        layout["col_vals"] = ((0,), tensors["col_vals"].dtype)
    return layout


def _in_rows(offsets: Tensor, words: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Entries in CSR: int64 offsets ``[rows + 1]``, and ``words`` row after row.

    PTCSR takes turns between the 16 rows of a tile and fills short rows up with zero words.
    """
    offsets = offsets.long()
    counts = offsets.diff()
    padded = len(counts) != rows
    ends_fit = int(offsets[0]) == 0 and int(offsets[-1]) == len(words)
    if not ends_fit or bool((counts < 0).any()) or (padded and bool((counts % TILE).any())):
        raise FormatError("row_offsets is damaged: it does not cut col_vals into rows")
    if not padded:
        return offsets, words
    tile = torch.repeat_interleave(torch.arange(len(counts), device=words.device), counts)
    row = tile * TILE + torch.arange(len(words), device=words.device) % TILE
    real = words.nonzero().squeeze(1)
    row, order = row[real].sort(stable=True)
    total = row.bincount(minlength=rows).cumsum(0)
    return torch.cat([offsets[:1], total]), words[real[order]]


def _decoded_under(outliers: Csr, codes: Tensor, grid: Grid) -> Tensor:
    """What the codes under ``outliers`` decode to, ``[entries]`` float32."""
    rows, columns = outliers.row_indices(), outliers.columns
    groups = columns // grid.group_size
    scale, zero = grid.scales()[rows, groups], grid.zeros()[rows, groups]
    return decode(codes[rows, columns], scale, zero)


def _pack_order(qtensor: QTensor) -> Tensor:
    """The inputs of stored columns, two in each int32; empty for the inputs' own order."""
    if qtensor.in_perm is None:
        return qtensor.codes.new_empty(0, dtype=torch.int32)
    return qtensor.in_perm.to(torch.int16).view(torch.int32)


def _unpack_order(stored: Tensor) -> Tensor | None:
    """Invert `_pack_order`."""
    return read_order(stored.view(torch.int16)) if stored.numel() else None
