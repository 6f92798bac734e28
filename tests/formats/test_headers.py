"""Headers of safetensors files: what does not agree with itself or the file is refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import _TYPES, save_file

from quantine import FormatError
from quantine.formats.headers import BITS, FLOATS, LONGEST, Entry, entries_of, read_entries
from quantine.runtime.placeholder import DTYPES, placeholder

SOUND = {
    "b": {"dtype": "F16", "shape": [2, 2], "data_offsets": [4, 12]},
    "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
    "empty": {"dtype": "I32", "shape": [0, 7], "data_offsets": [12, 12]},
}


def written(path: Path, header: str | dict[str, Any], body: int = 12, size: int = -1) -> Path:
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if size < 0 else size) + raw + b"x" * body)
    return path


def with_info(name: str, **changes: Any) -> dict[str, Any]:
    return {**SOUND, name: {**SOUND[name], **changes}}


def test_entries_are_those_of_the_header(tmp_path: Path) -> None:
    file = written(tmp_path / "f", {"__metadata__": {"format": "pt"}, **SOUND})
    found = entries_of([file])
    start = file.stat().st_size - 12
    assert found["a"] == Entry("a", "U8", (4,), file, start, 4)
    assert found["b"] == Entry("b", "F16", (2, 2), file, start + 4, 8)
    assert found["empty"] == Entry("empty", "I32", (0, 7), file, start + 12, 0)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (with_info("a", dtype="U9"), "a is of dtype 'U9'"),
        (with_info("a", dtype="F32"), "a has 4 bytes, but"),
        (with_info("a", shape=[5]), "a has 4 bytes, but"),
        (with_info("a", shape=[-4]), "a has sizes"),
        (with_info("a", shape=[True, 4]), "a has sizes"),
        (with_info("a", shape=[4.0]), "a has sizes"),
        (with_info("a", shape=[2**63]), "a has sizes"),
        (with_info("a", shape=[2**40, 2**40]), "a has 4 bytes, but"),
        (with_info("a", data_offsets=[4, 0]), "a has -4 bytes"),
        (with_info("b", data_offsets=[2, 10]), "b does not begin where a ends"),
        (with_info("a", data_offsets=[1, 5]), "before a"),
        ({key: info for key, info in SOUND.items() if key != "a"}, "before b"),
        (with_info("a", shape=None), "header is damaged"),
        (with_info("a", data_offsets=[0]), "header is damaged"),
        ({"a": 1}, "header is damaged"),
        (json.dumps(SOUND)[:-1] + ', "a": 1}', "header is damaged"),
        ("[" * 10**5, "header is damaged"),
        ("[]", "header is damaged"),
        ("{", "header is damaged"),
    ],
)
def test_headers_that_lie_are_refused(
    header: str | dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=said):
        read_entries(written(tmp_path / "f", header))


@pytest.mark.parametrize("size", [0, 10**6, LONGEST + 1, 2**64 - 1])
def test_lengths_of_headers_that_lie_are_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="is not a safetensors file"):
        read_entries(written(tmp_path / "f", SOUND, size=size))


def test_bytes_that_no_tensor_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds 13 bytes of tensors, not 12: cut off"):
        read_entries(written(tmp_path / "f", SOUND, body=13))


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    files = [written(tmp_path / name, SOUND) for name in ("f", "g")]
    with pytest.raises(FormatError, match=r"[ab] is in f and in g"):
        entries_of(files)


@pytest.mark.parametrize("name", sorted(_TYPES))
def test_every_dtype_of_the_library_is_understood_or_refused_by_name(
    name: str, tmp_path: Path
) -> None:
    dtype = _TYPES[name]
    save_file({"t": torch.zeros(3, dtype=torch.float32).to(dtype)}, tmp_path / "f")
    (entry,) = read_entries(tmp_path / "f")
    assert entry.dtype == name
    assert BITS[name] == 8 * dtype.itemsize
    assert (name in FLOATS) == (dtype.is_floating_point and dtype.itemsize > 1)
    if name in DTYPES:
        assert placeholder(entry).dtype == dtype
        return
    with pytest.raises(FormatError, match=f"t is stored as {name}"):
        placeholder(entry)
