"""Tensors of GGUF files in floats, read one by one: those that transformers loads."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ggufs import MODELS, write_gguf
from quantine import Calibration, CheckpointError, Plan
from quantine.formats.foreign.gguf import read
from quantine.run.prepare import prepare
from quantine.runtime.load import load_model
from quantine.source.locate import locate
from tiny_models import random_model, tiny_config

PLAN = Plan.preset("rtn", bits=4, group_size=32)
NONE = Calibration(samples=0)
KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0")


def read_by_quantine(path: Path) -> dict[str, Tensor]:
    job = prepare(path, PLAN, NONE)
    return job.checkpoint().read(job.model.state_dict())


def same_as_loaded(path: Path) -> None:
    found = read_by_quantine(path)
    loaded = load_model(locate(path), torch.float32).state_dict()
    by_transformers = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, config=locate(path).config()
    )
    for wanted in (loaded, by_transformers.state_dict()):
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"falcon_new"}))  # refused by name
def test_all_types_of_all_models(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "AT_ONCE", 1000)  # a few rows of these matrices
    model = random_model(tiny_config(name))
    same_as_loaded(write_gguf(tmp_path / "m.gguf", model, kind=gguf.GGMLQuantizationType[kind]))


def test_a_file_that_was_cut_off_meanwhile_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_model(tiny_config("llama")))
    job = prepare(path, PLAN, NONE)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(CheckpointError, match=r"m\.gguf ends within .*: it was cut off"):
        job.checkpoint().read(job.model.state_dict())
    path.unlink()
    with pytest.raises(CheckpointError, match=r"m\.gguf cannot be read"):
        job.checkpoint().read(job.model.state_dict())
