"""Reading float weights, and refusing what cannot be read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantine.calibrate.skeleton import skeleton
from quantine.errors import CheckpointError
from quantine.source.checkpoint import Checkpoint
from quantine.source.tensor_files import SafetensorsFiles
from quantine.source.weight_files import INDEX, SINGLE
from tiny_models import tiny_config

TENSORS = {
    "model.a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "model.b.weight": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "lm_head.weight": torch.tensor([[0.25]], dtype=torch.float16),
}


def opened(directory: Path, model: Any = None) -> Checkpoint:
    return Checkpoint(SafetensorsFiles(directory), model)


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
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_tensors_come_back_in_their_dtypes(kind: str, request: pytest.FixtureRequest) -> None:
    checkpoint = opened(request.getfixturevalue(kind))
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
    read = opened(single).read(["model.a.weight"])["model.a.weight"]
    (single / SINGLE).write_bytes(b"gone")
    assert torch.equal(read, TENSORS["model.a.weight"])
    assert read.untyped_storage().nbytes() == read.nbytes


def test_missing_tensor_is_named(single: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tensor model\.c\.weight"):
        opened(single).read(["model.a.weight", "model.c.weight"])
    with pytest.raises(CheckpointError, match=r"holds no tensor model\.c\.weight"):
        opened(single).dtype("model.c.weight")


@pytest.fixture(scope="module")
def llama() -> Any:
    return skeleton(tiny_config("llama"))


def test_the_base_prefix_may_be_left_out(tmp_path: Path, llama: Any) -> None:
    save_file({"norm.weight": torch.ones(2), "lm_head.weight": torch.ones(3)}, tmp_path / SINGLE)
    checkpoint = opened(tmp_path, llama)
    assert checkpoint.read(["model.norm.weight"])["model.norm.weight"].tolist() == [1, 1]
    assert "lm_head.weight" in checkpoint
    assert checkpoint.unused == ()
    assert "model.norm.weight" not in opened(tmp_path)


def test_older_names_are_found(tmp_path: Path) -> None:
    save_file({"embed_out.weight": torch.ones(2)}, tmp_path / SINGLE)
    checkpoint = opened(tmp_path, skeleton(tiny_config("neox_parallel")))
    assert checkpoint.read(["lm_head.weight"])["lm_head.weight"].tolist() == [1, 1]


def test_a_tensor_that_is_there_twice_is_refused(tmp_path: Path, llama: Any) -> None:
    save_file(
        {"norm.weight": torch.zeros(1), "model.norm.weight": torch.ones(1)}, tmp_path / SINGLE
    )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is there twice"):
        opened(tmp_path, llama)


def test_rows_are_compared_as_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantine.source.checkpoint.COMPARED", 8)
    table = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = {"a": table, "b": table.float(), "c": table.clone(), "d": table[:8].clone()}
    tensors["c"][8, 3] += 1
    save_file(tensors, tmp_path / SINGLE)
    checkpoint = opened(tmp_path)
    assert checkpoint.are_equal("a", "a")
    assert checkpoint.are_equal("a", "b")
    assert not checkpoint.are_equal("a", "c")
    assert not checkpoint.are_equal("a", "d")


def test_a_file_that_does_not_fit_in_memory_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(30_000_000)}, tmp_path / SINGLE)
    script = f"""
import resource
from pathlib import Path
from quantine.errors import CheckpointError
from quantine.source.checkpoint import Checkpoint
from quantine.source.tensor_files import SafetensorsFiles
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for room in (20_000_000, 150_000_000):
    resource.setrlimit(resource.RLIMIT_AS, (used + room, -1))
    try:
        Checkpoint(SafetensorsFiles(Path({str(tmp_path)!r}))).read(["w"])
    except CheckpointError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.count("does not fit into the memory") == 2
    assert run.stdout.count(SINGLE) == 2


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    twice = {name: TENSORS[name] * 2 for name in ("model.a.weight", "model.b.weight")}
    save_file(twice, sharded / "model-00002-of-00003.safetensors")
    said = r"model\.a\.weight is in model-00001-of-00003\.safetensors and in model-00002-of-00003"
    with pytest.raises(CheckpointError, match=said):
        opened(sharded)


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names 3 files, but model-00002-of-00003\.safet"):
        opened(sharded)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file_is_half_downloaded(tmp_path: Path, share: float) -> None:
    save_file({"w": torch.zeros(1000)}, tmp_path / SINGLE)
    data = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="damaged or half downloaded"):
        opened(tmp_path)


def test_a_file_that_vanishes_later_is_reported(single: Path) -> None:
    checkpoint = opened(single)
    (single / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read(["model.a.weight"])


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, dtype=torch.int8)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="w is stored as I8: only checkpoints in floating"):
        opened(tmp_path).dtype("w")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_named(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    weights = {"good": torch.ones(3, dtype=dtype), "bad": torch.ones(3, 2, dtype=dtype)}
    weights["bad"][2, 1] = value
    save_file(weights, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=f"bad in {SINGLE} holds non-finite weights"):
        opened(tmp_path).digest()


def test_integers_and_scalars_have_a_digest(tmp_path: Path) -> None:
    save_file({"steps": torch.tensor(3), "none": torch.zeros(0, 2)}, tmp_path / SINGLE)
    assert len(opened(tmp_path).digest()) == 32


def test_digest_is_that_of_the_tensors_however_they_are_sharded(
    tmp_path: Path, single: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for number, name in enumerate(TENSORS):
        save_file({name: TENSORS[name]}, other / f"{number}.safetensors")
    weight_map = {name: f"{number}.safetensors" for number, name in enumerate(TENSORS)}
    (other / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert opened(single).digest() == opened(other).digest()


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
    before = opened(single).digest()
    save_file({**TENSORS, **changed}, single / SINGLE)
    assert opened(single).digest() != before
