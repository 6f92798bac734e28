"""Tensors that files hold in parts: convolutions of queries, keys and values, which run as one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantine.calibrate.skeleton import skeleton
from quantine.errors import CheckpointError
from quantine.source.checkpoint import Checkpoint
from quantine.source.read_record import ReadRecord
from quantine.source.tensor_files import SafetensorsFiles
from quantine.source.weight_files import INDEX, SINGLE
from quantine.survey.specimen import specimen_config, write_specimen
from tiny_models import stored_tensors

INSIDE = "model.layers.0.linear_attn"
JOINED = f"{INSIDE}.conv1d.weight"
PARTS = [f"{INSIDE}.{leaf}_conv1d.weight" for leaf in "qkv"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hybrid") / "model"
    write_specimen(specimen_config("olmo_hybrid"), directory)
    return directory


def of(directory: Path, record: ReadRecord | None = None) -> Checkpoint:
    return Checkpoint(SafetensorsFiles(directory), skeleton(specimen_config("olmo_hybrid")), record)


def in_shards(source: Path, out: Path, tensors: dict[str, Tensor]) -> Path:
    """A copy of the model with other tensors, each part of the convolution in a file of its own."""
    shutil.copytree(source, out)
    (out / SINGLE).unlink()
    file_of = {name: f"{PARTS.index(name) if name in PARTS else 3}.safetensors" for name in tensors}
    for file in set(file_of.values()):
        save_file({name: tensors[name] for name in tensors if file_of[name] == file}, out / file)
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return out


def test_parts_are_joined_as_transformers_joins_them(source: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = model.get_parameter(JOINED)
    stored = stored_tensors(source)
    assert {*PARTS} <= stored.keys()
    for directory in (source, in_shards(source, tmp_path / "shards", stored)):
        checkpoint = of(directory)
        assert checkpoint.unused == ()
        assert torch.equal(checkpoint.read([JOINED])[JOINED], expected)
        assert checkpoint.shapes([JOINED]) == {JOINED: tuple(expected.shape)}
        assert JOINED in checkpoint


def test_a_change_of_any_part_is_seen(source: Path, tmp_path: Path) -> None:
    stored = stored_tensors(source)
    checkpoint = of(in_shards(source, tmp_path / "shards", stored), ReadRecord())
    checkpoint.read([JOINED])
    assert checkpoint.changed() is None
    save_file({PARTS[2]: stored[PARTS[2]] + 1}, tmp_path / "shards" / "2.safetensors")
    assert checkpoint.changed() == JOINED


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({PARTS[1]: None}, r"conv1d\.weight lacks a part: .*k_conv1d"),
        ({JOINED: torch.zeros(3, 1, 4)}, r"conv1d\.weight is there twice"),
    ],
)
def test_parts_that_are_missing_or_there_twice_are_refused(
    change: dict[str, Tensor | None], reason: str, source: Path, tmp_path: Path
) -> None:
    changed = {**stored_tensors(source), **change}
    tensors = {name: tensor for name, tensor in changed.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=reason):
        of(in_shards(source, tmp_path / "other", tensors))


def test_parts_of_other_dtypes_are_refused(source: Path, tmp_path: Path) -> None:
    stored = stored_tensors(source)
    stored[PARTS[1]] = stored[PARTS[1]].half()
    with pytest.raises(CheckpointError, match=r"parts that do not fit together"):
        of(in_shards(source, tmp_path / "other", stored)).read([JOINED])
