"""Every tensor of a GGUF file's model is there, in its shape, and none beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

import quantine
from ggufs import ARCHITECTURES, MODELS, divergence, write_gguf
from quantine import Calibration, CheckpointError, Plan
from quantine.runtime.load import load_model
from quantine.source.gguf.weights import model_names
from quantine.source.locate import locate
from tiny_models import random_model, tiny_config

RTN = Plan.preset("rtn", bits=8, group_size=32)
NONE = Calibration(samples=0)
ENDS = {"token_embd.weight", "output_norm.weight", "output.weight"}


@functools.cache
def model_of(family: str) -> Any:
    return random_model(tiny_config(family))


@pytest.mark.parametrize("family", MODELS)
def test_names_are_those_that_transformers_finds(family: str) -> None:
    model = model_of(family)
    found = get_gguf_hf_weights_map(model, TensorProcessor())
    assert model_names(ARCHITECTURES[model.config.model_type], model) == found


LOST: dict[str, tuple[Callable[[str], bool], str]] = {
    "a matrix": (lambda name: name == "blk.1.ffn_up.weight", "blk.1.ffn_up.weight"),
    "a norm": (lambda name: name == "blk.0.attn_norm.weight", "blk.0.attn_norm.weight"),
    "a bias": (lambda name: name == "blk.1.attn_q.bias", "blk.1.attn_q.bias"),
    "a block": (lambda name: name.startswith("blk.1."), "blk.1."),
    "the table": (lambda name: name == "token_embd.weight", "token_embd.weight"),
    "all": (lambda _: True, "token_embd.weight"),
    "all blocks": (lambda name: name not in ENDS, "tensors in all"),
}


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_missing_tensors_are_named_before_work(family: str, lost: str, tmp_path: Path) -> None:
    left_out, said = LOST[lost]
    if family == "llama" and lost == "a bias":
        pytest.skip("llama models have no biases")
    path = write_gguf(tmp_path / "m.gguf", model_of(family), left_out=left_out)
    with pytest.raises(CheckpointError) as refused:
        quantine.quantize(path, tmp_path / "out", RTN, NONE)
    assert "lacks" in str(refused.value)
    assert said in str(refused.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="lacks"):
        load_model(locate(path), torch.float32)


def test_a_file_without_its_head_takes_the_table(tmp_path: Path) -> None:
    """As llama.cpp does; nothing in the file says that a head is missing."""
    path = write_gguf(
        tmp_path / "m.gguf", model_of("llama"), left_out=lambda n: n == "output.weight"
    )
    assert locate(path).config().tie_word_embeddings is True


@pytest.mark.parametrize(
    "name",
    [
        "blk.2.ffn_up.weight",
        "blk.0.attn_q.bias",
        "rope_factors_long.weight",
        "blk.0.ffn_gate_exps.weight",
        "blk.0.attn_rot_embd.weight",
        "unheard_of",
    ],
)
def test_tensors_without_a_place_are_named_before_work(name: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), added={name: torch.ones(64)})
    with pytest.raises(CheckpointError) as refused:
        quantine.quantize(path, tmp_path / "out", RTN, NONE)
    assert name in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"feed_forward_length": 97}, {"vocab_size": 299}])
def test_other_shapes_are_named_before_work(changes: dict[str, Any], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), changes=changes)
    with pytest.raises(CheckpointError, match=r"has shape \(\d+, 64\), but its metadata imply"):
        quantine.quantize(path, tmp_path / "out", RTN, NONE)


def test_heads_of_another_size_are_named(tmp_path: Path) -> None:
    changes = {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16}
    path = write_gguf(tmp_path / "m.gguf", model_of("qwen3"), changes=changes)
    with pytest.raises(CheckpointError, match=r"attn_q\.weight .* has shape \(128, 64\)"):
        quantine.quantize(path, tmp_path / "out", RTN, NONE)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_what_is_whole_is_quantized(family: str, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "m.gguf", model_of(family), kind=kind)
    quantine.quantize(path, tmp_path / "out", RTN, NONE)
    found = quantine.load(tmp_path / "out", arithmetic="exact")[0]
    assert divergence(load_model(locate(path), torch.float32), found) < 0.5
