"""Reading headers of safetensors files: which tensors there are, and where their bytes lie."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from quantine.errors import FormatError

BITS: Final = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of an item of every dtype that safetensors has, by its name there."""
FLOATS: Final = frozenset({"F16", "BF16", "F32", "F64"})
"""Dtypes of floats that PyTorch computes with."""
LONGEST: Final = 10**8
"""Bytes that a header may have, as the library safetensors has it."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor's bytes lie.

    Attributes:
        name: full name of the tensor.
        dtype: as safetensors spells it, such as ``"F16"``.
        shape: of the tensor.
        file: that holds it.
        offset: of its first byte, counted from the start of the file.
        nbytes: number of its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_entries(file: Path) -> list[Entry]:
    """Where the tensors of a safetensors file lie; only its header is read.

    Raises:
        FormatError: the header is damaged, or says what the file does not hold; the message names
            the tensor.
    """
    length = file.stat().st_size
    with file.open("rb") as stream:
        raw = stream.read(8)
        size = struct.unpack("<Q", raw)[0] if len(raw) == 8 else -1
        if not 0 < size <= min(length - 8, LONGEST):
            raise FormatError(f"{file} is not a safetensors file")
        data = stream.read(size)
    try:
        header = json.loads(data, object_pairs_hook=_without_twins)
        header.pop("__metadata__", None)
        entries = [_entry(name, info, file, 8 + size) for name, info in header.items()]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{file} is not a safetensors file: its header is damaged") from error
    found, expected = length - 8 - size, max((_end(entry) for entry in entries), default=8 + size)
    if expected != length:
        expected -= 8 + size
        raise FormatError(f"{file} holds {found} bytes of tensors, not {expected}: cut off?")
    ordered = sorted(entries, key=lambda entry: (entry.offset, entry.nbytes))
    if ordered and ordered[0].offset != 8 + size:
        raise FormatError(f"{file}: nothing holds the bytes before {ordered[0].name}: damaged")
    for before, after in pairwise(ordered):
        if after.offset != _end(before):
            raise FormatError(
                f"{file}: {after.name} does not begin where {before.name} ends: its header is "
                "damaged"
            )
    return entries


def entries_of(files: Iterable[Path]) -> dict[str, Entry]:
    """Where the tensors of several safetensors files lie, by full name.

    Raises:
        FormatError: a header is damaged, see `read_entries`; or two files hold one name.
    """
    found: dict[str, Entry] = {}
    for file in files:
        for entry in read_entries(file):
            if entry.name in found:
                other = found[entry.name].file.name
                raise FormatError(
                    f"{entry.name} is in {other} and in {file.name}: one is of another model"
                )
            found[entry.name] = entry
    return found


def _entry(name: str, info: Any, file: Path, start: int) -> Entry:
    """An entry whose numbers agree with each other; ``start`` is where a file's tensors begin."""
    dtype, shape, (first, end) = info["dtype"], info["shape"], info["data_offsets"]
    if dtype not in BITS:
        raise FormatError(f"{file}: {name} is of dtype {dtype!r:.40}, which is not known")
    numbers = [first, end, *shape]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise FormatError(f"{file}: {name} has sizes that are no whole numbers: damaged")
    if (end - first) * 8 != math.prod(shape) * BITS[dtype]:
        raise FormatError(
            f"{file}: {name} has {end - first} bytes, but its shape and dtype need others: damaged"
        )
    return Entry(name, dtype, tuple(shape), file, start + first, end - first)


def _end(entry: Entry) -> int:
    return entry.offset + entry.nbytes


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object as a table, unless a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found
