"""Models that llama.cpp split into several GGUF files."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from quantine.errors import CheckpointError, cut
from quantine.source.gguf.header import (
    ALIGNMENT,
    MAGIC,
    VERSIONS,
    GGUFFile,
    GGUFTensor,
    read_header,
)

COPY_BYTES: Final = 2**24
"""Bytes that are copied at once, and so are in memory, when the parts of a model are joined."""
PART: Final = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
"""Names of the files of a model that llama.cpp split."""


def read_parts(path: Path, known: Mapping[int, tuple[int, int]] | None = None) -> list[GGUFFile]:
    """The headers of all files of the model that the file at ``path`` is part of, in order.

    Args:
        path: of one of the files.
        known: see `quantine.source.gguf.header.read_header`.

    Raises:
        CheckpointError: a part is missing, damaged, or of another model.
    """
    found = PART.match(path.name)
    if found is None:
        whole = read_header(path, known)
        count = whole.metadata.get("split.count", 1)
        if count != 1:
            raise CheckpointError(
                f"{path} is one of {cut(count, 20)} parts of a model, but its name does not say "
                "which: name it as llama.cpp does, NAME-00001-of-00002.gguf"
            )
        return [whole]
    total = int(found["count"])
    names = [f"{found['stem']}-{number:05}-of-{total:05}.gguf" for number in range(1, total + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing or not names:
        raise CheckpointError(
            f"{path} is one of {total} parts of a model, and {len(missing)} are missing: "
            f"{', '.join(missing[:2])}; download them beside it"
        )
    parts = [read_header(path.parent / name, known) for name in names]
    for number, part in enumerate(parts):
        said = part.metadata.get("split.count", total), part.metadata.get("split.no", number)
        if said != (total, number):
            raise CheckpointError(
                f"{part.path} calls itself part {cut(said[1], 20)} of {cut(said[0], 20)}, counted "
                "from 0, unlike its name: download it again"
            )
    tensors = [tensor.name for part in parts for tensor in part.tensors]
    expected = parts[0].metadata.get("split.tensors.count", len(tensors))
    if len(set(tensors)) != len(tensors) or len(tensors) != expected:
        raise CheckpointError(
            f"the parts of {path} hold {len(tensors)} tensors, {len(set(tensors))} of them "
            f"different, not {expected}: they are of several models"
        )
    return parts


def first_part(name: str) -> str:
    """Name of the first file of the model that the file ``name`` is part of: its own if alone."""
    found = PART.match(name)
    return name if found is None else f"{found['stem']}-00001-of-{found['count']}.gguf"


def join(parts: Sequence[GGUFFile], path: Path) -> None:
    """Write the parts of a model as one GGUF file, with the metadata of the first.

    Args:
        parts: the result of `read_parts`.
        path: of the file that is written.
    """
    entries = [
        data for key, data in parts[0].stored.items()
        if not key.startswith("split.") and key != "general.alignment"
    ]  # fmt: skip
    tensors = [tensor for part in parts for tensor in part.tensors]
    table, offset = [], 0
    for tensor in tensors:
        table.append(_string(tensor.name) + struct.pack("<I", len(tensor.shape)))
        table.append(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
        table.append(struct.pack("<IQ", tensor.type, offset))
        offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    start = MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(entries))
    header = start + b"".join(entries) + b"".join(table)
    with path.open("wb") as target:
        target.write(header + bytes(-len(header) % ALIGNMENT))
        for tensor in tensors:
            _copy(tensor, target)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _copy(tensor: GGUFTensor, target: BinaryIO) -> None:
    with tensor.file.open("rb") as source:
        source.seek(tensor.offset)
        for start in range(0, tensor.nbytes, COPY_BYTES):
            target.write(source.read(min(COPY_BYTES, tensor.nbytes - start)))
    target.write(bytes(-tensor.nbytes % ALIGNMENT))
