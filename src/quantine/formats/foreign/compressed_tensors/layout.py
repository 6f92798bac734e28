"""The tensors of one matrix in a checkpoint of compressed-tensors, format ``pack-quantized``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from quantine.core.spec import QuantSpec
from quantine.errors import FormatError
from quantine.formats.foreign.plain import Plain
from quantine.formats.foreign.words import WORD, pack_rows, unpack_rows, words_of

NAMES: Final = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
"""Every tensor that a matrix may have beside its bias."""
FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of scales."""


def pack_matrix(matrix: Plain, sym: bool) -> dict[str, Tensor]:
    """The tensors of a matrix whose groups are consecutive inputs.

    ``weight_packed`` int32 ``[out, in * bits / 32]``, a stream of codes in each row;
    ``weight_scale`` float16 ``[out, groups]``; ``weight_zero_point`` int32
    ``[out * bits / 32, groups]``, streams along outputs, only of asymmetric grids;
    ``weight_shape`` int64 ``[2]``. Signed codes plus half their number are what is stored, which
    are quantine's codes.
    """
    assert matrix.group_of is None
    tensors = {
        "weight_packed": pack_rows(matrix.codes, matrix.bits),
        "weight_scale": matrix.scale,
        "weight_shape": torch.tensor(matrix.codes.shape, dtype=torch.int64, device="cpu"),
    }
    if not sym:
        tensors["weight_zero_point"] = pack_rows(matrix.zero.T, matrix.bits).T.contiguous()
    return tensors


def unpack_matrix(
    name: str, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, int]
) -> Plain:
    """Invert `pack_matrix`, also for files of before June 2026, which pad each word.

    Those had as many whole codes in a word as fit, which differs for 3, 5, 6 and 7 bits. Shapes
    tell which it is.

    Args:
        name: of the layer, for errors.
        tensors: by their names in the layout.
        spec: of the layer.
        shape: ``(out, in)`` of the matrix.

    Raises:
        FormatError: a tensor is missing, of another shape or dtype, or holds what none may hold.
    """
    rows, columns = shape
    if not spec.divides(columns):
        raise FormatError(f"{name}: groups of {spec.group_size} do not divide {columns} inputs")
    groups = spec.groups(columns)
    said = tensors.get("weight_shape")
    if said is not None and said.flatten().tolist() != [rows, columns]:
        raise FormatError(f"{name}.weight_shape says {said.tolist()}, but it is {[rows, columns]}")
    codes, padded = _unpacked(
        f"{name}.weight_packed", tensors.get("weight_packed"), spec.bits, shape
    )
    scale = _scales(f"{name}.weight_scale", tensors.get("weight_scale"), (rows, groups))
    points = tensors.get("weight_zero_point")
    if spec.sym and (points is None or (points.dtype == torch.int8 and not bool(points.any()))):
        zero = torch.full_like(scale, 2 ** (spec.bits - 1), dtype=torch.uint8)
        return Plain(codes, scale, zero, spec.bits)
    # Symmetric ones may have zero points, too; whoever reads them refuses those off the middle.
    flat = None if points is None or points.ndim != 2 else points.T
    zero, _ = _unpacked(f"{name}.weight_zero_point", flat, spec.bits, (groups, rows), padded)
    return Plain(codes, scale, zero.T.contiguous(), spec.bits)


def _unpacked(
    name: str,
    words: Tensor | None,
    bits: int,
    shape: tuple[int, int],
    padded: bool | None = None,
) -> tuple[Tensor, bool]:
    """Codes ``shape`` in rows of words, and whether words are padded.

    Args:
        padded: whether they must be; ``None`` lets the shape tell, which it does from 32 codes on.
    """
    rows, count = shape
    per_word = WORD // bits
    dense, loose = words_of(count, bits), -(-count // per_word)
    lengths = {False: dense, True: loose} if padded is None else {padded: (dense, loose)[padded]}
    found = None if words is None else (tuple(words.shape), words.dtype)
    fits = [kind for kind, length in lengths.items() if found == ((rows, length), torch.int32)]
    if words is None or not fits:
        said = "missing" if found is None else f"{found[1]} {list(found[0])}"
        raise FormatError(
            f"{name} is {said}, but {bits} bits need torch.int32 {[rows, dense]}: the file is "
            "damaged"
        )
    if not fits[0]:
        if len(fits) > 1 and WORD % bits:
            raise FormatError(f"{name} is so small that its shape does not tell how it is packed")
        return unpack_rows(words, bits, count), False
    shifts = torch.arange(per_word, device=words.device) * bits
    fields: Tensor = words.long().unsqueeze(-1) >> shifts & (2**bits - 1)
    return fields.flatten(1)[:, :count].to(torch.uint8).contiguous(), True


def _scales(name: str, scale: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Scales as they are stored.

    Raises:
        FormatError: they are missing, of another shape, or not positive.
    """
    if scale is None or tuple(scale.shape) != shape or scale.dtype not in FLOATS:
        said = "missing" if scale is None else f"{scale.dtype} {list(scale.shape)}"
        raise FormatError(f"{name} is {said}, but must be floats {list(shape)}")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise FormatError(f"{name} holds what is no scale: they are positive and finite")
    return scale.contiguous()
