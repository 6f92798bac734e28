"""What GGUF metadata say is in the config, or refused by name; transformers' models decide."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ggufs import divergence, write_gguf
from quantine.errors import CheckpointError, FamilyError, QuantineError
from quantine.runtime.generate import end_tokens
from quantine.runtime.load import load_model
from quantine.source.gguf.config import ARCHITECTURES, gguf_config
from quantine.source.gguf.header import read_header
from quantine.source.locate import locate
from tiny_models import random_model, tiny_config

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama_tied", {}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3, narrow heads": ("qwen3", {"head_dim": 8}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma2, other caps": (
        "gemma2",
        {
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 5,
        },
    ),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 16, "num_hidden_layers": 7}),
    "phi3": ("phi3", {}),
    "phi3, window and part of the head": (
        "phi3",
        {
            "sliding_window": 7,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "falcon": ("falcon_old", {}),
    "bloom": ("bloom", {}),
    "gpt2": ("gpt2", {}),
}


@functools.cache
def model_of(family: str, **changes: Any) -> Any:
    return random_model(tiny_config(family, **changes))


def loaded(path: Path) -> Any:
    return load_model(locate(path), torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_that_which_was_written(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    model = random_model(tiny_config(family, **changes))
    found = loaded(write_gguf(tmp_path / "m.gguf", model))
    assert divergence(model, found) < 1e-4
    assert found.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_every_architecture_is_tried() -> None:
    assert {"llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "falcon", "bloom", "gpt2"} == {
        *ARCHITECTURES
    }


def test_special_tokens_are_those_of_the_file(tmp_path: Path) -> None:
    config = locate(write_gguf(tmp_path / "m.gguf", model_of("qwen2"))).config()
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 257, None)


def test_blocks_of_another_version_are_refused(tmp_path: Path) -> None:
    said = {".general.quantization_version": 1}
    with pytest.raises(CheckpointError, match="blocks of version 1"):
        locate(write_gguf(tmp_path / "m.gguf", model_of("qwen2"), changes=said)).config()


def test_every_token_that_ends_an_answer_is_one(tmp_path: Path) -> None:
    """The end of a turn, the end of a message; one that is the end of a text once more is not."""
    ends = {".tokenizer.ggml.eot_token_id": 65, ".tokenizer.ggml.eom_token_id": 257}
    file = write_gguf(tmp_path / "m.gguf", model_of("qwen2"), changes=ends)
    assert locate(file).config().eos_token_id == [257, 65]
    assert end_tokens(loaded(file)) == {257, 65}
    header = read_header(file)
    gone = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eom_token_id")
    others = {key: value for key, value in header.metadata.items() if key not in gone}
    assert gguf_config([replace(header, metadata=others)]).eos_token_id == 65


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": (
        {"rope_type": "linear", "factor": 4.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "linear, unnamed": ({"rope_type": "linear", "factor": 2.5}, {"rope.scaling.factor": 2.5}),
    "linear, old": ({"rope_type": "linear", "factor": 8.0}, {"rope.scale_linear": 8.0}),
    "none": (
        {"rope_type": "default"},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0, "rope.scaling.finetuned": True},
    ),
    "yarn": (
        YARN,
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
        },
    ),
    "yarn, further values": (
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.8 * 1.1386294361},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.attn_factor": 0.8,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 2.0,
        },
    ),
}


@pytest.mark.parametrize("scaling", SCALED)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_scaled_rotary_embeddings_are_kept(family: str, scaling: str, tmp_path: Path) -> None:
    rope, metadata = SCALED[scaling]
    changes = {"rope_parameters": {**rope, "rope_theta": 5000.0}}
    model = random_model(tiny_config(family, **changes))
    found = loaded(write_gguf(tmp_path / "m.gguf", model, changes=metadata))
    assert divergence(model, found) < 1e-4
    unscaled = random_model(tiny_config(family, rope_parameters={"rope_theta": 5000.0}))
    assert (divergence(model, unscaled) > 0.01) == (scaling != "none")


def test_gemma_scales_global_attention_only(tmp_path: Path) -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    changes = {"query_pre_attn_scalar": 16, "num_hidden_layers": 7, "rope_parameters": rope}
    model = random_model(tiny_config("gemma3", **changes))
    metadata = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    assert (
        divergence(model, loaded(write_gguf(tmp_path / "m.gguf", model, changes=metadata))) < 1e-4
    )


def factors_of(config: Any) -> torch.Tensor:
    """What llama.cpp's converter stores for a config of type ``llama3``."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    count = len(scaled)
    theta = config.rope_parameters["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(count, dtype=torch.float32) / count)
    return plain / scaled


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_of_frequencies_are_kept(factor: float, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    model = random_model(tiny_config("llama", rope_parameters=rope))
    added = {"rope_freqs.weight": factors_of(model.config)}
    path = write_gguf(tmp_path / "m.gguf", model, added=added)
    found = locate(path).config().rope_parameters
    assert found == rope | {"factor": pytest.approx(factor)}
    assert divergence(model, loaded(path)) < 1e-4


def test_factors_of_one_change_nothing(tmp_path: Path) -> None:
    added = {"rope_freqs.weight": torch.ones(8)}
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), added=added)
    assert divergence(model_of("llama"), loaded(path)) < 1e-4


FACTORS = {
    "of another kind": torch.tensor([1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 9.0]),
    "not float32": torch.ones(8).half(),
    "not a list": torch.ones(2, 4),
    "not finite": torch.full((8,), float("nan")),
}


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_other_factors_of_frequencies_are_refused(factors: torch.Tensor, tmp_path: Path) -> None:
    added = {"rope_freqs.weight": factors}
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), added=added)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        locate(path).config()


NOT_UNDERSTOOD: dict[str, dict[str, Any]] = {
    "rope.scaling.type": {"rope.scaling.type": "longrope"},
    "attention.sliding_window": {"attention.sliding_window": 4096},
    "attention.clamp_kqv": {"attention.clamp_kqv": 8.0},
    "attention.scale": {"attention.scale": 0.1},
    "logit_scale": {"logit_scale": 0.0625},
    "embedding_scale": {"embedding_scale": 12.0},
    "residual_scale": {"residual_scale": 0.2},
    "final_logit_softcapping": {"final_logit_softcapping": 30.0},
    "expert_count": {"expert_count": 8, "expert_used_count": 2},
    "value_length": {"attention.value_length": 8},
    "rotary": {"rope.dimension_count": 8},
    "heads of each block": {"attention.head_count_kv": [2, 1]},
    "yarn_log_multiplier": {"rope.scaling.yarn_log_multiplier": 0.1},
    "attention.causal": {"attention.causal": False},
    "unheard_of": {"unheard_of": 1},
}


@pytest.mark.parametrize("changes", NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD)
def test_metadata_that_are_not_understood_are_refused(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), changes=changes)
    with pytest.raises(CheckpointError) as refused:
        locate(path).config()
    assert len(str(refused.value).replace(str(path), "")) < 300


@pytest.mark.parametrize("key", ["attention.scale", "logit_scale", "unheard_of"])
def test_the_refusal_has_the_name_and_the_value(key: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model_of("qwen2"), changes={key: 0.5})
    with pytest.raises(CheckpointError, match=rf"qwen2\.{key} = 0\.5"):
        locate(path).config()


def test_metadata_that_say_nothing_are_passed_over(tmp_path: Path) -> None:
    said = {
        "expert_count": 0,
        "attention.causal": True,
        "tensor_data_layout": "Meta AI original pth",
    }
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), changes=said)
    assert locate(path).config().num_hidden_layers == 2


def test_phi_4_has_a_window_of_0_tokens_which_means_none(tmp_path: Path) -> None:
    changes = {"attention.sliding_window": 0}
    path = write_gguf(tmp_path / "m.gguf", model_of("phi3"), changes=changes)
    assert locate(path).config().sliding_window is None


@pytest.mark.parametrize(
    "key",
    ["block_count", "embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon"],
)
@pytest.mark.parametrize("value", [None, 0, "two", True, [2]])
def test_metadata_that_must_be_there(key: str, value: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), changes={key: value})
    with pytest.raises(CheckpointError, match=key):
        locate(path).config()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0, "2"])
def test_numbers_of_a_scaling_must_make_sense(value: Any, tmp_path: Path) -> None:
    changes = {"rope.scaling.type": "linear", "rope.scaling.factor": value}
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), changes=changes)
    with pytest.raises(CheckpointError, match=r"rope\.scaling\.factor"):
        locate(path).config()


def test_a_token_beyond_the_vocabulary_is_none(tmp_path: Path) -> None:
    changes = {".tokenizer.ggml.padding_token_id": 300}
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), changes=changes)
    assert locate(path).config().pad_token_id is None


@pytest.mark.parametrize("values", [[0.0] * 8, [math.inf] + [1.0] * 7, [1.0] * 4])
def test_frequencies_that_are_none_are_refused(tmp_path: Path, values: list[float]) -> None:
    added = {"rope_freqs.weight": torch.tensor(values)}
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), added=added)
    with pytest.raises(CheckpointError, match=r"rope_freqs"):
        locate(path).config()


def test_a_part_of_a_head_is_not_rotated_where_the_model_rotates_all(tmp_path: Path) -> None:
    model = model_of("qwen2")
    width = model.config.hidden_size // model.config.num_attention_heads
    changes = {"rope.dimension_count": width // 2}
    path = write_gguf(tmp_path / "m.gguf", model, changes=changes)
    with pytest.raises(CheckpointError, match="of other widths"):
        locate(path).config()


def test_what_only_yarn_reads_does_not_matter_elsewhere(tmp_path: Path) -> None:
    changes = {"rope.scaling.type": "none", "rope.scaling.original_context_length": 64}
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), changes=changes)
    assert locate(path).config().rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(
    "key", [".general.type", ".general.architecture", ".general.alignment", "x" * 2000]
)
def test_messages_stay_short_whatever_metadata_say(tmp_path: Path, key: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), changes={key: "v" * 2000})
    with pytest.raises(QuantineError) as refusal:
        locate(path).config()
    assert len(str(refusal.value).replace(str(path), "")) < 300


def test_a_head_that_is_the_table_is_tied_and_another_is_not(tmp_path: Path) -> None:
    model = model_of("llama_tied")
    table = model.get_input_embeddings().weight
    for head, tied in ((table, True), (table + 1, False), (table[:, :32], False)):
        path = write_gguf(tmp_path / "m.gguf", model, added={"output.weight": head})
        assert locate(path).config().tie_word_embeddings is tied


def test_other_kinds_of_files_are_refused(tmp_path: Path) -> None:
    changes = {".general.type": gguf.GGUFType.ADAPTER}
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"), changes=changes)
    with pytest.raises(CheckpointError, match="of type 'adapter'"):
        locate(path).config()


def test_other_architectures_are_refused_with_the_list(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "mamba")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(FamilyError, match="'mamba' are not read, only those of llama, qwen2"):
        locate(tmp_path / "m.gguf").config()


@pytest.mark.parametrize("window", [None, 0])
def test_local_attention_needs_its_window(tmp_path: Path, window: int | None) -> None:
    changes = {"attention.sliding_window": window}
    path = write_gguf(tmp_path / "m.gguf", model_of("gemma3"), changes=changes)
    with pytest.raises(CheckpointError, match="sliding_window"):
        locate(path).config()
