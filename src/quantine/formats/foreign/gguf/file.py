"""Writing GGUF files of version 3, one tensor in memory at a time."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from quantine.source.gguf.header import ALIGNMENT, ARRAY, MAGIC, STRING, VERSIONS

KINDS: Final = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f"), str: (STRING, "")}
"""Code and layout of values of metadata, by their type; whole numbers are uint32."""
SIGNED: Final = 5
"""Code of the type int32, of which llama.cpp has the whole numbers of arrays."""

Value = int | float | bool | str | Sequence[int] | Sequence[str] | Sequence[float]
"""A value of metadata; items of a sequence are of one kind."""


@dataclass(frozen=True)
class Stored:
    """A tensor that has been written.

    Attributes:
        name: as llama.cpp calls it.
        shape: in PyTorch's order.
        kind: code of ggml's type.
        nbytes: of its data.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    nbytes: int


class GGUFWriter:
    """Collects tensors in a file of their own; `finish` puts header and tensors together.

    As a context it closes that file.

    Args:
        scratch: of the file with tensors, which must not exist.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._file: BinaryIO = scratch.open("xb")
        self.tensors: list[Stored] = []

    def __enter__(self) -> GGUFWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, name: str, shape: Sequence[int], kind: int, data: bytes) -> None:
        """Write one tensor.

        Args:
            name: as llama.cpp calls it.
            shape: in PyTorch's order.
            kind: code of ggml's type.
            data: its bytes.
        """
        self._file.write(data + bytes(-len(data) % ALIGNMENT))
        self.tensors.append(Stored(name, tuple(shape), kind, len(data)))

    def finish(self, path: Path, metadata: dict[str, Value]) -> None:
        """Write the file with ``metadata`` and all tensors, and delete the scratch file."""
        self._file.close()
        table, offset = [], 0
        for tensor in self.tensors:
            sizes = struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
            table.append(_string(tensor.name) + struct.pack("<I", len(tensor.shape)) + sizes)
            table.append(struct.pack("<IQ", tensor.kind, offset))
            offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
        counts = struct.pack("<IQQ", VERSIONS[-1], len(self.tensors), len(metadata))
        entries = b"".join(_string(key) + _value(value) for key, value in metadata.items())
        header = MAGIC + counts + entries + b"".join(table)
        with path.open("xb") as target, self._scratch.open("rb") as source:
            target.write(header + bytes(-len(header) % ALIGNMENT))
            shutil.copyfileobj(source, target, 2**24)
        self._scratch.unlink()


def _value(value: Value) -> bytes:
    """A value behind the code of its type."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        kind, layout = KINDS[type(value)]
        return struct.pack("<I", kind) + _packed(value, layout)
    first = type(value[0]) if value else str
    kind, layout = (SIGNED, "<i") if first is int else KINDS[first]
    items = b"".join(_packed(item, layout) for item in value)
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + items


def _packed(value: float | str, layout: str) -> bytes:
    return _string(value) if isinstance(value, str) else struct.pack(layout, value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
