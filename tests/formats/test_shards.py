"""Writing and merging safetensors files."""

from __future__ import annotations

import json
import os
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantine.errors import FormatError
from quantine.formats import shards
from quantine.formats.headers import read_entries
from quantine.formats.shards import merge_parts, write_atomically, write_tensors
from quantine.source.checkpoint import Checkpoint
from quantine.source.tensor_files import SafetensorsFiles
from quantine.source.weight_files import INDEX, SINGLE

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "U8": 1}
PARTS = [
    {
        "a.codes": torch.arange(7, dtype=torch.uint8),
        "a.scale": torch.tensor([[0.5, 2.0]], dtype=torch.float16),
    },
    {"b.bias": torch.tensor([1.0, 2.0, 3.0]), "b.codes": torch.tensor([[9]], dtype=torch.uint8)},
    {"c.order": torch.tensor([3, 1, 2], dtype=torch.int16), "c.steps": torch.tensor(5)},
    {"d.weight": torch.ones(3, 5, dtype=torch.bfloat16), "d.none": torch.zeros(0, 4)},
]
UNION = {name: tensor for part in PARTS for name, tensor in part.items()}


def write_parts(directory: Path) -> list[Path]:
    directory.mkdir()
    files = [directory / f"{number}.safetensors" for number in range(len(PARTS))]
    for file, tensors in zip(files, PARTS, strict=True):
        save_file(tensors, file)
    return files


def nbytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_small_parts_make_one_file(tmp_path: Path) -> None:
    merge_parts(write_parts(tmp_path / "parts"), tmp_path, shard_bytes=10**6)
    assert_same(load_file(tmp_path / SINGLE), UNION)
    assert sorted(file.name for file in tmp_path.iterdir()) == [SINGLE, "parts"]


def test_exactly_full_is_not_too_full(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    merge_parts(parts, tmp_path, shard_bytes=nbytes(UNION))
    assert not (tmp_path / INDEX).exists()
    merge_parts(parts, tmp_path, shard_bytes=nbytes(UNION) - 1)
    assert (tmp_path / INDEX).exists()


@pytest.mark.parametrize("shard_bytes", [1, 12, 24, 30, 40])
def test_shards_hold_the_union_and_the_index_says_where(tmp_path: Path, shard_bytes: int) -> None:
    out = tmp_path / "out"
    out.mkdir()
    merge_parts(write_parts(tmp_path / "parts"), out, shard_bytes)
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == nbytes(UNION)
    assert list(index["weight_map"]) == sorted(UNION)
    files = sorted(out.glob("*.safetensors"))
    count = len(files)
    assert [f.name for f in files] == [
        f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)
    ]
    for file in files:
        held = load_file(file)
        assert {n for n, where in index["weight_map"].items() if where == file.name} == set(held)
        # A shard is within the limit, or it is a single part that no shard could hold.
        assert nbytes(held) <= shard_bytes or any(part.keys() == held.keys() for part in PARTS)
    assert_same(Checkpoint(SafetensorsFiles(out)).read(UNION), UNION)


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    merge_parts(write_parts(tmp_path / "parts"), tmp_path, shard_bytes=10**6)
    entries = read_entries(tmp_path / SINGLE)
    assert {entry.name for entry in entries} == set(UNION)
    for entry in entries:
        assert entry.offset % ITEM_BYTES[entry.dtype] == 0
    raw = (tmp_path / SINGLE).read_bytes()
    assert struct.unpack("<Q", raw[:8])[0] % 8 == 0
    # Bytes lie end to end: nothing of a file is padding.
    ends = sorted((entry.offset, entry.offset + entry.nbytes) for entry in entries)
    assert all(end == start for (_, end), (start, _) in pairwise(ends))
    assert ends[-1][1] == len(raw)


def test_the_same_parts_give_the_same_bytes(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    merge_parts(parts, tmp_path, shard_bytes=10**6)
    first = (tmp_path / SINGLE).read_bytes()
    merge_parts(parts, tmp_path, shard_bytes=10**6)
    assert (tmp_path / SINGLE).read_bytes() == first


def test_large_tensors_are_copied_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "COPY_BYTES", 3)
    merge_parts(write_parts(tmp_path / "parts"), tmp_path, shard_bytes=10**6)
    assert_same(load_file(tmp_path / SINGLE), UNION)


def test_entries_agree_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_tensors(file, UNION)
    raw = file.read_bytes()
    for entry in read_entries(file):
        tensor = UNION[entry.name]
        assert entry.shape == tuple(tensor.shape)
        data = raw[entry.offset : entry.offset + entry.nbytes]
        assert data == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert_same(load_file(file), UNION)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08\x00",
        struct.pack("<Q", 0),
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 4) + b"{{{{",
        struct.pack("<Q", 4) + b"\xff\xfe\xff\xfe",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 10) + b'{"w":   3}',
        struct.pack("<Q", 10) + b'{"w":  {}}',
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(data)
    with pytest.raises(FormatError, match=r"x\.safetensors is not a safetensors file"):
        read_entries(file)


def test_a_part_that_ends_early_is_refused(tmp_path: Path) -> None:
    parts = write_parts(tmp_path / "parts")
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"1\.safetensors holds 12 bytes of tensors, not 13"):
        merge_parts(parts, tmp_path, shard_bytes=10**6)
    assert not (tmp_path / SINGLE).exists()


def test_writing_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.json", b"first")
    write_atomically(tmp_path / "a.json", b"second")
    write_tensors(tmp_path / "b.safetensors", UNION)
    merge_parts([tmp_path / "b.safetensors"], tmp_path, shard_bytes=1)
    assert (tmp_path / "a.json").read_bytes() == b"second"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.json", "b.safetensors", SINGLE]


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "a.json", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"old"
