"""Reading AWQ checkpoints (arXiv 2306.00978) of version ``gemm``: 4 bits, eight codes a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from quantine.core.spec import WHOLE_ROW, QuantSpec
from quantine.errors import FormatError, PlanError, cut, shown
from quantine.formats.foreign.opened import DirectoryLayout, Spec, Unpack
from quantine.formats.foreign.plain import Plain, names_in, plain_spec
from quantine.formats.layout import check_scales

BITS: Final = 4
"""The one width of codes."""
ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in its word of each of eight consecutive outputs."""
NAMES: Final = ("qweight", "qzeros", "scales")
"""Every tensor that a matrix has beside its bias: ``[in, out / 8]`` int32, ``[groups, out / 8]``
int32, ``[groups, out]`` float16."""


def _spec(said: Mapping[str, Any]) -> Spec:
    version = str(said.get("version") or "gemm").lower()
    bits = said.get("bits", said.get("w_bit"))
    if version != "gemm" or bits != BITS:
        raise FormatError(f"AWQ of version {shown(version)} with {shown(bits)} bits is not read")
    size = said.get("group_size", said.get("q_group_size", WHOLE_ROW))
    points = said.get("zero_point", True)
    if not isinstance(points, bool):
        raise FormatError(f"zero_point in quantization_config is {shown(points)}: true or false")
    skipped = names_in(said, "modules_to_not_convert")
    try:
        spec = plain_spec(BITS, size, not points)
    except PlanError as error:
        raise FormatError(f"quantization_config is damaged: {cut(error)}") from error
    return lambda name: None if name in skipped else spec


def _unpack(_: Mapping[str, Any]) -> Unpack:
    return unpack_matrix


def unpack_matrix(
    name: str, tensors: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, int]
) -> Plain:
    """A matrix ``[out, in]`` from its tensors.

    Raises:
        FormatError: a tensor is missing, or of another shape or dtype.
    """
    rows, columns = shape
    groups = spec.groups(columns)
    expected = {
        "qweight": ((columns, rows // 8), torch.int32),
        "qzeros": ((groups, rows // 8), torch.int32),
        "scales": ((groups, rows), torch.float16),
    }
    for key, wanted in expected.items():
        found = tensors.get(key)
        if found is None or (tuple(found.shape), found.dtype) != wanted:
            said = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise FormatError(f"{name}.{key} is {said}, but must be {wanted[1]} {list(wanted[0])}")
    check_scales(f"{name}.scales", tensors["scales"])
    codes, zero = _unpacked(tensors["qweight"]), _unpacked(tensors["qzeros"])
    return Plain(codes, tensors["scales"].T.contiguous(), zero, BITS)


def _unpacked(words: Tensor) -> Tensor:
    """Codes ``[outputs, n]`` of words ``[n, outputs / 8]``."""
    shifts = torch.tensor(ORDER, device=words.device, dtype=torch.int32) * BITS
    fields = words.unsqueeze(-1) >> shifts & 15
    return fields.flatten(1).to(torch.uint8).T.contiguous()


LAYOUT: Final = DirectoryLayout(NAMES, _spec, _unpack)
"""How the matrices of an AWQ checkpoint are stored."""
