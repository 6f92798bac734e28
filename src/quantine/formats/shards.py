"""Writing safetensors files: atomically, and merged from parts without loading them."""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from safetensors.torch import save
from torch import Tensor

from quantine.errors import FormatError
from quantine.formats.headers import Entry, read_entries
from quantine.source.weight_files import INDEX, SINGLE

METADATA: Final = {"format": "pt"}
"""The ``__metadata__`` that transformers asks for in a weight file."""
COPY_BYTES: Final = 2**24
"""Bytes that are copied at once, and so are in memory, when files are merged."""
HEADER_ALIGNMENT: Final = 8
"""Bytes of which the length of a header is a multiple, so that tensors can be mapped."""

TEMPORARY: Final = ".tmp"
"""How the names of files end that are still being written."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that exists whole or not at all, also after a crash.

    Of several that write the same file at once, the last one's content stays.
    """
    temporary = path.with_name(f"{path.name}.{threading.get_native_id()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            flush_to_disk(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors``, by name, as one safetensors file, like `write_atomically`."""
    write_atomically(path, save(dict(tensors), metadata=METADATA))


def merge_parts(parts: Sequence[Path], directory: Path, shard_bytes: int) -> None:
    """Merge part files, in order, into the shards of a Hugging Face directory.

    Args:
        parts: safetensors files with distinct tensor names.
        directory: gets ``model.safetensors``, or numbered shards and their index.
        shard_bytes: bytes of tensors a shard may hold; a larger part gets a shard of its own.
    """
    shards = divided(parts, shard_bytes)
    for name, entries in shards.items():
        _write_shard(entries, directory / name)
    if len(shards) > 1:
        write_atomically(directory / INDEX, index_of(shards))


def divided(parts: Sequence[Path], shard_bytes: int) -> dict[str, list[Entry]]:
    """The tensors of part files, by the name of the shard that they go to; see `merge_parts`."""
    shards: list[list[Entry]] = [[]]
    for part in parts:
        entries = read_entries(part)
        if shards[-1] and _nbytes([*shards[-1], *entries]) > shard_bytes:
            shards.append([])
        shards[-1].extend(entries)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": entries
        for number, entries in enumerate(shards, 1)
    }


def index_of(shards: Mapping[str, Sequence[Entry]]) -> bytes:
    """The content of the index of `divided` tensors that are in several shards."""
    weight_map = {entry.name: name for name, entries in shards.items() for entry in entries}
    total = sum(_nbytes(entries) for entries in shards.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"


def _nbytes(entries: Sequence[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)


def laid_out(entries: Sequence[Entry]) -> tuple[bytes, list[Entry]]:
    """How a file holds ``entries``: the bytes before the first tensor, and the order of tensors.

    They follow one another without gaps, wide items first, so that every tensor starts at a
    multiple of its item size.
    """
    ordered = sorted(entries, key=lambda entry: (-_item_bytes(entry), entry.name))
    header: dict[str, object] = {"__metadata__": METADATA}
    position = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(raw)) + raw, ordered


def _write_shard(entries: Sequence[Entry], path: Path) -> None:
    start, ordered = laid_out(entries)
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as target:
        target.write(start)
        for entry in ordered:
            _copy(entry, target)
        flush_to_disk(target)
    temporary.replace(path)


def _item_bytes(entry: Entry) -> int:
    return entry.nbytes // max(1, math.prod(entry.shape))


def _copy(entry: Entry, target: BinaryIO) -> None:
    with entry.file.open("rb") as source:
        source.seek(entry.offset)
        left = entry.nbytes
        while left:
            data = source.read(min(left, COPY_BYTES))
            if not data:
                raise FormatError(f"{entry.file} ends inside tensor {entry.name}")
            target.write(data)
            left -= len(data)


def flush_to_disk(file: BinaryIO) -> None:
    """Return once what was written to ``file`` survives a failure of power."""
    file.flush()
    os.fsync(file.fileno())
