"""Headers of GGUF files agree with the ``gguf`` package, and damage to them ends in one error."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import pytest

from ggufs import write_gguf
from quantine.errors import CheckpointError, QuantineError
from quantine.source.gguf.header import Length, read_header
from quantine.source.locate import locate
from tiny_models import random_model, tiny_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    kind = gguf.GGMLQuantizationType.Q4_0
    return write_gguf(path, random_model(tiny_config("llama")), kind=kind)


def test_it_reads_what_the_package_reads(whole: Path) -> None:
    reader, header = gguf.GGUFReader(str(whole)), read_header(whole)
    assert [
        (t.name, tuple(reversed(t.shape.tolist())), int(t.tensor_type), t.data_offset, t.n_bytes)
        for t in reader.tensors
    ] == [(t.name, t.shape, t.type, t.offset, t.nbytes) for t in header.tensors]
    for key, value in header.metadata.items():
        said = reader.fields[key].contents()
        assert value == (Length(len(said)) if isinstance(said, list) else said)
    assert all(
        t.read() == t_.data.tobytes() for t, t_ in zip(header.tensors, reader.tensors, strict=True)
    )


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_off_says_so(whole: Path, share: float, tmp_path: Path) -> None:
    data = whole.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(
        CheckpointError, match=r"cut\.gguf is (damaged or half downloaded|not a GGUF)"
    ):
        locate(tmp_path / "cut.gguf")


def test_mutated_headers_end_in_named_errors(whole: Path, tmp_path: Path) -> None:
    """Bytes, lengths and counts are changed all over the header; loading is never reached."""
    data, dice = whole.read_bytes(), random.Random(0)
    end = min(tensor.offset for tensor in read_header(whole).tensors)
    path = tmp_path / "mutant.gguf"
    refused = []
    for _ in range(400):
        mutant = bytearray(data)
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(4, end - 8)
            value = dice.choice([0, 1, 255, 2**31, 2**32 - 1, 2**60, 2**64 - 1])
            mutant[at : at + 8] = struct.pack("<Q", value)
        path.write_bytes(mutant)
        try:
            locate(path).config()
        except QuantineError as error:
            refused.append(str(error).replace(str(path), ""))
    assert len(refused) > 300
    assert max(map(len, refused)) < 300


def test_a_type_that_cannot_be_decoded_is_named(whole: Path, tmp_path: Path) -> None:
    data = bytearray(whole.read_bytes())
    name = b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    for kind in (24, 99):
        data[at : at + 4] = struct.pack("<I", kind)
        (tmp_path / "m.gguf").write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"ffn_up.* is of ggml's type {kind}"):
            read_header(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("moved", "said"),
    [
        (4, "begins at [0-9]+, which is no multiple of 32"),
        (None, "share bytes"),  # where another tensor begins
    ],
)
def test_tensors_lie_apart_at_whole_units(
    whole: Path, moved: int | None, said: str, tmp_path: Path
) -> None:
    header, data = read_header(whole), bytearray(whole.read_bytes())
    one, other = header.tensors[1], header.tensors[2]
    start = min(tensor.offset for tensor in header.tensors)
    name = one.name.encode()
    place = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    place += 4 + 8 * len(one.shape) + 4  # the number of axes, the axes, and the type
    assert struct.unpack_from("<Q", data, place)[0] == one.offset - start
    to = other.offset - start if moved is None else one.offset - start + moved
    struct.pack_into("<Q", data, place, to)
    (tmp_path / "moved.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=said):
        locate(tmp_path / "moved.gguf").config()
