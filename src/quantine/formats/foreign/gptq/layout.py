"""The tensors of one matrix in a GPTQ checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from quantine.errors import FormatError
from quantine.formats.foreign.plain import Plain
from quantine.formats.foreign.words import pack_rows, unpack_rows, words_of
from quantine.formats.layout import check_scales

NAMES: Final = ("qweight", "qzeros", "scales", "g_idx")
"""Every tensor that a matrix may have beside its bias."""
BITS: Final = (2, 3, 4, 8)
"""Widths of codes."""


def pack_matrix(matrix: Plain, version: int, ordered: bool) -> dict[str, Tensor]:
    """The tensors of a matrix.

    ``qweight`` int32 ``[in * bits / 32, out]``, a stream of codes down each column; ``qzeros``
    int32 ``[groups, out * bits / 32]``, streams along outputs of zero points, in version 1 less
    one; ``scales`` float16 ``[groups, out]``; ``g_idx`` int32 ``[in]``.

    Args:
        version: 1, where no zero point may be 0, or 2.
        ordered: whether a matrix of the model needs ``g_idx``, as its groups are not consecutive
            inputs: then each has it.
    """
    zero = matrix.zero - 1 if version == 1 else matrix.zero
    tensors = {
        "qweight": pack_rows(matrix.codes, matrix.bits).T.contiguous(),
        "qzeros": pack_rows(zero.T, matrix.bits),
        "scales": matrix.scale.T.contiguous(),
    }
    if ordered:
        group_of = matrix.group_of
        if group_of is None:
            group_of = torch.arange(matrix.codes.shape[1], device=matrix.codes.device)
            group_of = group_of // matrix.group_size
        tensors["g_idx"] = group_of.to(torch.int32)
    return tensors


def unpack_matrix(
    name: str,
    tensors: Mapping[str, Tensor],
    bits: int,
    version: int,
    shape: tuple[int, int],
    group_size: int,
    ordered: bool,
) -> Plain:
    """Invert `pack_matrix`.

    Args:
        name: of the layer, for errors.
        tensors: by their names in the layout.
        bits: of a code.
        version: 1 or 2.
        shape: ``(out, in)`` of the matrix.
        group_size: number of inputs of a group, which divides ``in``.
        ordered: see `quantine.formats.foreign.gptq.settings.Settings`.

    Raises:
        FormatError: a tensor is missing, of another shape or dtype, or holds what none may hold.
    """
    rows, columns = shape
    groups = columns // group_size
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "qweight": ((words_of(columns, bits), rows), torch.int32),
        "qzeros": ((groups, words_of(rows, bits)), torch.int32),
        "scales": ((groups, rows), torch.float16),
    }
    if "g_idx" in tensors or (ordered and groups > 1):
        expected["g_idx"] = ((columns,), torch.int32)
    for key, (size, dtype) in expected.items():
        found = tensors.get(key)
        if found is None or tuple(found.shape) != size or found.dtype != dtype:
            said = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise FormatError(
                f"{name}.{key} is {said}, but {bits} bits in groups of {group_size} need {dtype} "
                f"{list(size)}: the file is damaged, or of another version"
            )
    check_scales(f"{name}.scales", tensors["scales"])
    zero = unpack_rows(tensors["qzeros"], bits, rows)
    if version == 1:
        if bool((zero == 2**bits - 1).any()):
            raise FormatError(
                f"{name}.qzeros holds a zero point of {2**bits}, but {bits} bits end at "
                f"{2**bits - 1}: damaged, or a file of version 2 that calls itself 1"
            )
        zero = zero + 1
    codes = unpack_rows(tensors["qweight"].T, bits, columns)
    group_of = _groups(name, tensors["g_idx"], group_size) if "g_idx" in tensors else None
    return Plain(codes, tensors["scales"].T.contiguous(), zero.T.contiguous(), bits, group_of)


def _groups(name: str, g_idx: Tensor, group_size: int) -> Tensor | None:
    """``g_idx`` if it is more than consecutive groups.

    Raises:
        FormatError: it does not give every group as many inputs as it must have.
    """
    groups = len(g_idx) // group_size
    inside = bool(((g_idx >= 0) & (g_idx < groups)).all())
    if not inside or bool((g_idx.long().bincount(minlength=groups) != group_size).any()):
        raise FormatError(
            f"{name}.g_idx is wrong: it does not give each of {groups} groups {group_size} inputs"
        )
    plain = torch.arange(len(g_idx), device=g_idx.device) // group_size
    return None if torch.equal(g_idx.long(), plain) else g_idx
