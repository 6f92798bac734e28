"""Parts become shards without being on disk twice, whenever the process is killed meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from quantine.errors import OutputError
from quantine.formats import moving
from quantine.formats.moving import move_parts, moved_entries, planned_moves
from quantine.formats.shards import merge_parts, write_tensors

PIECES = {"of tensors": 60, "several tensors": 300}
"""Bytes that are copied at once in these tests."""


def tensors(part: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(part)
    return {
        f"{part}.codes": torch.randint(0, 256, (7, 31), generator=generator, dtype=torch.uint8),
        f"{part}.scale": torch.randn(7, 5, generator=generator).half(),
        f"{part}.norm": torch.randn(61, generator=generator),
        f"{part}.none": torch.empty(0, 3),
    }


@pytest.fixture(params=PIECES.values(), ids=PIECES.keys())
def parts(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(moving, "MOVED_BYTES", request.param)
    (tmp_path / "parts").mkdir()
    for part in range(4):
        write_tensors(tmp_path / "parts" / f"{part}.safetensors", tensors(part))
    return tmp_path / "parts"


def merged(parts: Path, shard_bytes: int) -> dict[str, bytes]:
    """The files that the parts have to become."""
    out = parts.with_name("merged")
    out.mkdir()
    merge_parts(sorted(parts.iterdir()), out, shard_bytes)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def moved(moves: dict[str, Any], parts: Path) -> dict[str, bytes]:
    out = parts.with_name("out")
    out.mkdir(exist_ok=True)
    move_parts(moves, parts, parts.with_name("shards"), out)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def on_disk(root: Path) -> int:
    """Bytes that files below ``root`` take; holes of a file take none, up to a block each."""
    return sum(path.stat().st_blocks * 512 for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("shard_bytes", [1, 1200, 10**6], ids=["each", "two", "one"])
def test_moved_parts_have_the_bytes_of_merged_ones(shard_bytes: int, parts: Path) -> None:
    expected = merged(parts, shard_bytes)
    moves = planned_moves(sorted(parts.iterdir()), shard_bytes)
    assert moved(moves, parts) == expected
    assert list(parts.iterdir()) == []
    assert {entry.name: entry.shape for entry in moved_entries(moves)} == {
        name: tuple(tensor.shape) for part in range(4) for name, tensor in tensors(part).items()
    }


@pytest.mark.parametrize("shard_bytes", [1200, 10**6], ids=["two", "one"])
def test_killed_at_any_moment(
    shard_bytes: int, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = merged(parts, shard_bytes)
    moves = planned_moves(sorted(parts.iterdir()), shard_bytes)
    unlink, replace, fsync = Path.unlink, Path.replace, os.fsync
    left = 0

    def counted(call: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            return call(*args, **options)

        return wrapped

    kills = 0
    with monkeypatch.context() as patched:
        for owner, name, call in (
            (Path, "unlink", unlink),
            (Path, "replace", replace),
            (os, "fsync", fsync),
        ):
            patched.setattr(owner, name, counted(call))
        while True:
            left = 1 + kills % 3  # each process gets that far
            try:
                found = moved(moves, parts)
                break
            except KeyboardInterrupt:
                kills += 1
    assert kills > (15 if moving.MOVED_BYTES < 100 else 5)
    assert found == expected


def test_nothing_is_on_disk_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts").mkdir()
    monkeypatch.setattr(moving, "MOVED_BYTES", 2**16)
    for part in range(3):
        tensor = torch.full((2**20,), part, dtype=torch.uint8)
        write_tensors(tmp_path / "parts" / f"{part}.safetensors", {f"t{part}": tensor})
    moves = planned_moves(sorted((tmp_path / "parts").iterdir()), 10**9)
    most, fsync = 0, os.fsync

    def looked(file: int) -> None:
        nonlocal most
        fsync(file)
        most = max(most, on_disk(tmp_path))

    monkeypatch.setattr(os, "fsync", looked)
    moved(moves, tmp_path / "parts")
    assert 3 * 2**20 <= most < 1.1 * 3 * 2**20


def test_a_lost_shard_is_named(parts: Path) -> None:
    moves = planned_moves(sorted(parts.iterdir()), 10**6)
    (parts / "2.safetensors").unlink()
    with pytest.raises(OutputError, match=r"model\.safetensors is gone"):
        moved(moves, parts)
