"""Tensors without memory that have the shape and dtype of tensors in a file."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from quantine.errors import FormatError
from quantine.formats.headers import Entry

DTYPES: Final = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "F32": torch.float32,
}
"""Dtypes of the tensors of packed layouts and of activation grids, by safetensors' names."""


def placeholder(entry: Entry) -> Tensor:
    """A tensor on the meta device with the shape and dtype of ``entry``, from a file's header.

    Raises:
        FormatError: nothing that is packed has that dtype.
    """
    if entry.dtype not in DTYPES:
        raise FormatError(
            f"{entry.name} is stored as {entry.dtype}, but packed tensors are of "
            f"{', '.join(DTYPES)}: it is damaged"
        )
    return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
