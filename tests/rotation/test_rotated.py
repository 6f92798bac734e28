"""Rotated models compute what the original does, for every family; others are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quantine import Calibration, CheckpointError, FamilyError, Plan
from quantine.core.transform_spec import Rotate
from quantine.rotation.checkpoint import RotatedCheckpoint
from quantine.run.job import Job
from quantine.run.prepare import prepare
from quantine.tuning.student import float_model
from tiny_models import build, logits_of, tiny_config, with_weights

Tiny = Callable[[str], Path]
ROTATABLE = (
    "llama", "llama_tied", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "opt", "neox_parallel",
    "neox_sequential", "gpt2", "falcon_old", "falcon_new",
)  # fmt: skip
REFUSED = {
    "gemma2": "post_attention_layernorm",
    "gemma3": "post_attention_layernorm",
    "opt_projected": "do_layer_norm_before is True, not False",
    "bloom": "word_embeddings_layernorm",
}
PLAN = replace(Plan.preset("rtn", group_size=-1), transforms=(Rotate(),))


def job_of(model: Path, plan: Plan = PLAN) -> Job:
    return prepare(model, plan, Calibration(samples=0))


def model_of(job: Job) -> Any:
    return float_model(job.config, job.checkpoint(), torch.device("cpu")).eval()


@pytest.mark.parametrize("name", ROTATABLE)
def test_a_rotated_model_computes_the_same_with_other_weights(name: str, tiny: Tiny) -> None:
    job = job_of(tiny(name))
    model = model_of(job)
    wanted = logits_of(with_weights(tiny(name), {}))
    assert torch.allclose(logits_of(model), wanted, atol=1e-4)
    plain = with_weights(tiny(name), {})
    for decision in job.decisions:
        before = decision.layer.read(plain)
        change = (decision.layer.read(model) - before).norm() / before.norm()
        assert change > 0.3, decision.layer.name
    # Each side counts: a matrix that is not rotated breaks the model.
    layers = [d.layer for d in job.decisions if d.layer.role != "embedding"]
    for layer in (layers[0], layers[-2], layers[-1]):
        before = layer.read(model)
        layer.write(model, layer.read(plain))
        assert not torch.allclose(logits_of(model), wanted, atol=0.1), layer.name
        layer.write(model, before)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_by_name(name: str, tiny: Tiny) -> None:
    with pytest.raises(FamilyError, match=REFUSED[name]) as caught:
        job_of(tiny(name))
    assert "leave out `rotate`" in str(caught.value)


def test_a_parameter_that_nobody_knows_is_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantine.families.llama import LLAMA

    monkeypatch.setattr("quantine.families.FAMILIES", (replace(LLAMA, untouched=()),))
    with pytest.raises(
        FamilyError, match=r"model\.layers\.0\.self_attn\.k_norm\.weight is neither"
    ):
        job_of(tiny("qwen3"))


def test_norms_give_their_weights_away(tiny: Tiny) -> None:
    job = job_of(tiny("opt"))
    model = model_of(job)
    norms = [m for path, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    assert all(bool((norm.weight == 1).all()) for norm in norms)
    # The head has no bias that could take that of the last norm.
    *inside, last = [norm.bias for norm in norms[1:] + norms[:1]]
    assert all(bool((bias == 0).all()) for bias in inside)
    assert bool((last != 0).any())


def test_a_bias_that_nothing_can_take_is_refused(tmp_path: Path) -> None:
    model = build(tiny_config("opt"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.decoder.final_layer_norm.weight"][3] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    job = job_of(model)
    with pytest.raises(CheckpointError, match=r"final_layer_norm\.weight is 0 where"):
        job.checkpoint().read(["model.decoder.final_layer_norm.bias"])


def test_a_rotated_source_is_recorded_as_what_it_is(tiny: Tiny) -> None:
    turned, plain = (
        job_of(tiny("llama_tied")),
        job_of(tiny("llama_tied"), replace(PLAN, transforms=())),
    )
    assert isinstance(turned.checkpoint(), RotatedCheckpoint)
    assert turned.checkpoint().digest() == plain.checkpoint().digest()
    assert turned.table_copied
    assert not job_of(tiny("llama")).table_copied


def test_reading_together_gives_what_reading_apart_does(tiny: Tiny) -> None:
    job = job_of(tiny("qwen2"))
    names = list(job.model.state_dict())
    together = job.checkpoint().read(names)
    assert list(together) == names
    for name in names:
        assert torch.equal(job.checkpoint().read([name])[name], together[name]), name
