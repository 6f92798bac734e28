"""Reading float weights, and refusing what cannot be read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantine.errors import CheckpointError
from quantine.source.checkpoint import INDEX, SINGLE, Checkpoint, weight_files

TENSORS = {
    "model.a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "model.b.weight": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "lm_head.weight": torch.tensor([[0.25]], dtype=torch.float16),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items(), 1):
        file = f"model-{number:05}-of-00003.safetensors"
        save_file({name: tensor}, tmp_path / file)
        weight_map[name] = file
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_tensors_come_back_in_their_dtypes(kind: str, request: pytest.FixtureRequest) -> None:
    checkpoint = Checkpoint(request.getfixturevalue(kind))
    assert same(checkpoint.read(TENSORS), TENSORS)
    assert same(checkpoint.read(["lm_head.weight"]), {"lm_head.weight": TENSORS["lm_head.weight"]})
    assert checkpoint.read([]) == {}
    assert "model.a.weight" in checkpoint
    assert "model.c.weight" not in checkpoint
    assert {name: checkpoint.dtype(name) for name in TENSORS} == {
        name: tensor.dtype for name, tensor in TENSORS.items()
    }
    assert checkpoint.shapes([*TENSORS, "model.c.weight"]) == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }


def test_read_tensors_own_their_memory(single: Path) -> None:
    read = Checkpoint(single).read(["model.a.weight"])["model.a.weight"]
    (single / SINGLE).write_bytes(b"gone")
    assert torch.equal(read, TENSORS["model.a.weight"])
    assert read.untyped_storage().nbytes() == read.nbytes


def test_missing_tensor_is_named(single: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tensor model\.c\.weight"):
        Checkpoint(single).read(["model.a.weight", "model.c.weight"])
    with pytest.raises(CheckpointError, match=r"holds no tensor model\.c\.weight"):
        Checkpoint(single).dtype("model.c.weight")


@pytest.mark.parametrize(("stored", "asked"), [("a.weight", "model.a.weight"), ("model.a", "a")])
def test_the_base_prefix_may_be_left_out_on_either_side(
    tmp_path: Path, stored: str, asked: str
) -> None:
    save_file({stored: torch.ones(2)}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path, prefix="model")
    assert checkpoint.read([asked])[asked].tolist() == [1, 1]
    assert asked not in Checkpoint(tmp_path)


def test_renamed_prefixes_are_found(tmp_path: Path) -> None:
    save_file({"embed_out.weight": torch.ones(2)}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path, renames=[("embed_out.", "lm_head.")])
    assert checkpoint.read(["lm_head.weight"])["lm_head.weight"].tolist() == [1, 1]
    assert "model.lm_head.weight" not in checkpoint


def test_an_exact_name_wins_over_a_rename(tmp_path: Path) -> None:
    save_file({"old.w": torch.zeros(1), "new.w": torch.ones(1)}, tmp_path / SINGLE)
    assert Checkpoint(tmp_path, renames=[("old.", "new.")]).read(["new.w"])["new.w"].item() == 1


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 3 files, but model-00002-of-00003\.safet"):
        Checkpoint(sharded)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file_is_half_downloaded(tmp_path: Path, share: float) -> None:
    save_file({"w": torch.zeros(1000)}, tmp_path / SINGLE)
    data = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="damaged or half downloaded"):
        Checkpoint(tmp_path)


def test_a_file_that_vanishes_later_is_reported(single: Path) -> None:
    checkpoint = Checkpoint(single)
    (single / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read(["model.a.weight"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_never_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"only pickled weights.*{name}.*safetensors first"):
        Checkpoint(tmp_path)


def test_safetensors_beside_pickles_are_read(single: Path) -> None:
    (single / "pytorch_model.bin").write_bytes(b"")
    assert weight_files(single) == [single / SINGLE]


def test_empty_directory_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"holds neither {SINGLE} nor {INDEX}"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {"w": 1}}',
        b'{"weight_map": {"w": null, "v": "model.safetensors"}}',
    ],
)
def test_damaged_index_is_refused(single: Path, index: bytes) -> None:
    (single / INDEX).write_bytes(index)
    with pytest.raises(CheckpointError, match=f"{INDEX} is damaged"):
        Checkpoint(single)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, dtype=torch.int8)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="w is stored as I8: only floating-point"):
        Checkpoint(tmp_path).dtype("w")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_named(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    weights = {"good": torch.ones(3, dtype=dtype), "bad": torch.ones(3, 2, dtype=dtype)}
    weights["bad"][2, 1] = value
    save_file(weights, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=f"bad in {SINGLE} holds non-finite weights"):
        Checkpoint(tmp_path).digest()


def test_integers_and_scalars_have_a_digest(tmp_path: Path) -> None:
    save_file({"steps": torch.tensor(3), "none": torch.zeros(0, 2)}, tmp_path / SINGLE)
    assert len(Checkpoint(tmp_path).digest()) == 32


def test_digest_is_that_of_the_tensors_however_they_are_sharded(
    tmp_path: Path, single: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for number, name in enumerate(TENSORS):
        save_file({name: TENSORS[name]}, other / f"{number}.safetensors")
    weight_map = {name: f"{number}.safetensors" for number, name in enumerate(TENSORS)}
    (other / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert Checkpoint(single).digest() == Checkpoint(other).digest()


@pytest.mark.parametrize(
    "changed",
    [
        {"model.a.weight": torch.arange(6, dtype=torch.float32).view(3, 2)},
        {"model.a.weight": torch.arange(6, dtype=torch.float32).view(2, 3).flip(0)},
        {"lm_head.weight": torch.tensor([[0.25]], dtype=torch.bfloat16)},
        {"extra": torch.zeros(1)},
    ],
)
def test_digest_sees_every_change(single: Path, changed: dict[str, torch.Tensor]) -> None:
    before = Checkpoint(single).digest()
    save_file({**TENSORS, **changed}, single / SINGLE)
    assert Checkpoint(single).digest() != before
