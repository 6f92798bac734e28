"""Which files of a directory count, beside those that `test_layouts` compares with transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantine.errors import CheckpointError
from quantine.source.weight_files import INDEX, SINGLE, float_files, weight_files


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file({"w": torch.ones(1)}, tmp_path / SINGLE)
    return tmp_path


def test_a_single_file_wins_over_an_index(single: Path) -> None:
    (single / INDEX).write_text('{"weight_map": {"w": "gone.safetensors"}}')
    assert weight_files(single) == [single / SINGLE]


def test_the_file_that_the_config_names_wins(single: Path) -> None:
    (single / "other.safetensors").write_bytes((single / SINGLE).read_bytes())
    (single / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    assert weight_files(single) == [single / "other.safetensors"]


@pytest.mark.parametrize("named", ["gone.safetensors", "../x.safetensors", "model.bin", 3])
def test_a_file_that_the_config_names_must_be_there(single: Path, named: object) -> None:
    save_file({"w": torch.ones(1)}, single.parent / "x.safetensors")
    (single / "model.bin").write_bytes(b"")
    (single / "config.json").write_text(json.dumps({"transformers_weights": named}))
    with pytest.raises(CheckpointError, match="names weights in"):
        weight_files(single)


@pytest.mark.parametrize("place", ["../x.safetensors", "absolute"])
def test_an_index_names_no_files_elsewhere(tmp_path: Path, place: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    name = str(tmp_path / "x.safetensors") if place == "absolute" else place
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="which is not in its directory"):
        weight_files(model)


def test_a_distributed_checkpoint_is_refused(single: Path) -> None:
    (single / "shard-00001-model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="distributed checkpoint"):
        weight_files(single)


def test_an_adapter_beside_the_model_is_refused(single: Path) -> None:
    assert float_files(single) == [single / SINGLE]
    (single / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        float_files(single)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_never_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"only pickled weights.*{name}.*safetensors first"):
        weight_files(tmp_path)


def test_safetensors_beside_pickles_are_read(single: Path) -> None:
    (single / "pytorch_model.bin").write_bytes(b"")
    assert weight_files(single) == [single / SINGLE]


def test_empty_directory_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"holds neither {SINGLE} nor {INDEX}"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {"w": 1}}',
        b'{"weight_map": {"w": "model.safetensors"}}',
        b'{"metadata": null, "weight_map": {"w": "model.safetensors"}}',
        b'{"metadata": {}, "weight_map": {"w": "' + b"n" * 300 + b'"}}',
        b'{"weight_map": {"w": null, "v": "model.safetensors"}}',
    ],
)
def test_damaged_index_is_refused(tmp_path: Path, index: bytes) -> None:
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(CheckpointError, match=f"{INDEX} is damaged"):
        weight_files(tmp_path)
