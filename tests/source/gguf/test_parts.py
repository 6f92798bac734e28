"""Split GGUF models are read whole, or refused."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import quantine
from ggufs import divergence, stored_tensors, write_gguf
from quantine import Calibration, CheckpointError, Plan
from quantine.runtime.load import load_model
from quantine.source.locate import locate
from tiny_models import random_model, tiny_config

NONE = Calibration(samples=0)


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(tiny_config("llama"))


def write_parts(directory: Path, model: Any, count: int = 3, said: bool = True) -> Sequence[Path]:
    """Split the model as llama.cpp does: further parts have no metadata but their number."""
    names = list(stored_tensors(model))
    paths = []
    for number in range(count):
        own = set(names[number::count])
        changes: dict[str, Any] = {}
        if said:
            changes = {
                ".split.no": number,
                ".split.count": count,
                ".split.tensors.count": len(names),
            }
        path = directory / f"m-{number + 1:05}-of-{count:05}.gguf"
        write_gguf(path, model, changes=changes, left_out=lambda n, own=own: n not in own)
        paths.append(path)
    return paths


@pytest.mark.parametrize("said", [True, False], ids=["numbered", "named only"])
@pytest.mark.parametrize("given", [0, 2])
def test_any_part_stands_for_all(given: int, said: bool, model: Any, tmp_path: Path) -> None:
    paths = write_parts(tmp_path, model, said=said)
    source = locate(paths[given])
    assert source.gguf_file == paths[0].name
    assert source.weight_bytes() == sum(path.stat().st_size for path in paths)
    assert divergence(model, load_model(source, torch.float32)) < 1e-4
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_parts_are_quantized_as_the_whole(model: Any, tmp_path: Path) -> None:
    plan = Plan.preset("rtn", bits=8, group_size=32)
    whole = write_gguf(tmp_path / "whole.gguf", model)
    first = write_parts(tmp_path, model)[0]
    for path in (whole, first):
        quantine.quantize(path, tmp_path / f"{path.stem} out", plan, NONE)
    files = [tmp_path / f"{path.stem} out" / "model.safetensors" for path in (whole, first)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_digest_sees_every_part(model: Any, tmp_path: Path) -> None:
    paths = write_parts(tmp_path, model)
    before = locate(paths[0]).file_digests()
    assert locate(paths[1]).file_digests() == before
    data = bytearray(paths[2].read_bytes())
    data[-1] ^= 1
    paths[2].write_bytes(data)
    assert locate(paths[0]).file_digests() != before
    assert before.keys() == {path.name for path in paths}


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_part_is_named(lost: int, model: Any, tmp_path: Path) -> None:
    paths = write_parts(tmp_path, model)
    paths[lost].unlink()
    with pytest.raises(CheckpointError, match=rf"1 are missing: {paths[lost].name}"):
        locate(paths[(lost + 1) % 3])


def test_parts_of_other_models_are_refused(model: Any, tmp_path: Path) -> None:
    paths = write_parts(tmp_path, model)
    shutil.copy(paths[1], paths[2])
    with pytest.raises(CheckpointError, match="calls itself part 1 of 3"):
        locate(paths[0])
    (tmp_path / "unnamed").mkdir()
    paths = write_parts(tmp_path / "unnamed", model, said=False)
    shutil.copy(paths[1], paths[2])
    with pytest.raises(CheckpointError, match="they are of several models"):
        locate(paths[0])


def test_a_part_under_another_name_is_refused(model: Any, tmp_path: Path) -> None:
    paths = write_parts(tmp_path, model)
    renamed = paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match="is one of 3 parts"):
        locate(renamed)
