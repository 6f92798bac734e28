"""Moving part files into shards, so that nothing but the piece in hand is on disk twice.

Each tensor of a shard is written at its place. A part is copied from its end, and made shorter
after each piece: its length says what is still to be copied. So a process that is killed at any
moment leaves enough for the next one, which copies one piece again at most.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from quantine.errors import OutputError
from quantine.formats.headers import Entry, read_entries
from quantine.formats.shards import (
    divided,
    flush_to_disk,
    index_of,
    laid_out,
    write_atomically,
)
from quantine.source.weight_files import INDEX

MOVED_BYTES: Final = 2**26
"""Bytes that are on disk twice, at most, while parts are moved."""

Moves = dict[str, Any]
"""Where each tensor of the parts goes, as plain values: headers of parts are lost with them."""
Piece = tuple[Entry, int, int]
"""Bytes of a part that are copied at once: their tensor, the first one's place in it, how many."""


def planned_moves(parts: Sequence[Path], shard_bytes: int) -> Moves:
    """Where the tensors of ``parts`` go; the arguments are those of `shards.merge_parts`."""
    shards = divided(parts, shard_bytes)
    return {
        "shards": {name: [_as_plain(entry) for entry in found] for name, found in shards.items()},
        "index": index_of(shards).decode() if len(shards) > 1 else None,
    }


def planned_move(parts: Sequence[Path], name: str) -> Moves:
    """Where the tensors of ``parts`` go if all go to one file; without parts there is none."""
    found = [_as_plain(entry) for part in parts for entry in read_entries(part)]
    return {"shards": {name: found} if found else {}, "index": None}


def moved_entries(moves: Moves) -> list[Entry]:
    """The tensors that are moved; the places are those in the parts, which may be gone."""
    return [_entry(plain) for found in moves["shards"].values() for plain in found]


def move_parts(moves: Moves, parts: Path, unfinished: Path, directory: Path) -> None:
    """Move all parts into shards, or go on where an earlier process stopped.

    Args:
        moves: the result of `planned_moves`, which has to be on disk before this begins.
        parts: directory of the part files, which are removed.
        unfinished: directory for shards that are not whole, on the same disk.
        directory: gets the shards, with the bytes that `shards.merge_parts` gives them, and their
            index.

    Raises:
        OutputError: an earlier process moved parts into a file that is gone.
    """
    unfinished.mkdir(exist_ok=True)
    for name, plain in moves["shards"].items():
        if not (directory / name).exists():  # an earlier process has not come so far
            _move_shard([_entry(one) for one in plain], parts, unfinished / name)
            (unfinished / name).replace(directory / name)
    if moves["index"] is not None:
        write_atomically(directory / INDEX, moves["index"].encode())


def _move_shard(entries: Sequence[Entry], parts: Path, path: Path) -> None:
    """Move the parts with ``entries`` into the file ``path``."""
    start, ordered = laid_out(entries)
    places, position = {}, len(start)
    for entry in ordered:
        places[entry.name] = position
        position += entry.nbytes
    by_part: dict[str, list[Entry]] = {}
    for entry in entries:
        by_part.setdefault(entry.file.name, []).append(entry)
    if not path.exists() and not all((parts / name).exists() for name in by_part):
        raise OutputError(f"{path} is gone, and with it finished work: delete the directory")
    # Not truncated: an earlier process may have moved parts into it.
    with os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR, 0o666), "r+b") as target:
        target.truncate(position)
        target.write(start)
        for name, found in by_part.items():
            if (parts / name).exists():
                _move_part(parts / name, found, places, target)
        flush_to_disk(target)


def _move_part(
    part: Path, entries: Iterable[Entry], places: Mapping[str, int], target: BinaryIO
) -> None:
    """Copy a part into ``target`` from its end, cutting off what has been copied; remove it."""
    with part.open("r+b") as source:
        for pieces in _turns(_pieces(entries, part.stat().st_size)):
            for entry, first, nbytes in pieces:
                source.seek(entry.offset + first)
                target.seek(places[entry.name] + first)
                target.write(source.read(nbytes))
            flush_to_disk(target)
            source.truncate(entry.offset + first)
    part.unlink()


def _turns(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Successive pieces, as many at once as `MOVED_BYTES` holds: the disk is waited for once."""
    turn: list[Piece] = []
    for piece in pieces:
        if turn and sum(nbytes for *_, nbytes in turn) + piece[2] > MOVED_BYTES:
            yield turn
            turn = []
        turn.append(piece)
    if turn:
        yield turn


def _pieces(entries: Iterable[Entry], length: int) -> Iterator[Piece]:
    """What is left of a part of ``length`` bytes, last first."""
    for entry in sorted(entries, key=lambda entry: entry.offset, reverse=True):
        end = min(entry.nbytes, length - entry.offset)
        while end > 0:
            first = max(0, end - MOVED_BYTES)
            yield entry, first, end - first
            end = first


def _as_plain(entry: Entry) -> list[Any]:
    where = [entry.file.name, entry.offset, entry.nbytes]
    return [entry.name, entry.dtype, list(entry.shape), *where]


def _entry(plain: list[Any]) -> Entry:
    name, dtype, shape, file, offset, nbytes = plain
    return Entry(name, dtype, tuple(shape), Path(file), offset, nbytes)
