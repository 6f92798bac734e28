"""Rotated models through the pipeline: quantized, stored, loaded, decoded, and continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantine
from quantine import Calibration, Plan, PlanError
from quantine.comparison.short_forms import plan_of
from quantine.core.transform_spec import Rotate
from quantine.formats.directory import RUN_DIRECTORY
from stopped_runs import stopped_at
from tiny_models import logits_of, some_tokens, stored_tensors, with_weights

Tiny = Callable[[str], Path]
RULES = [{"match": "@blocks", "method": "gptq", "bits": 8, "group_size": 16}]


def rotated(**fields: Any) -> Plan:
    return Plan.from_dict({"rules": RULES, "transforms": ["rotate"], **fields})


@pytest.mark.parametrize("name", ["llama_tied", "opt", "phi3"])
def test_what_is_stored_computes_what_the_float_model_does(
    name: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    plan = rotated(arithmetic="exact")
    result = quantine.quantize(tiny(name), tmp_path / "out", plan, short)
    assert result.report["plan"]["transforms"] == [{"rotate": {"seed": 0}}]
    assert Plan.from_dict(result.report["plan"]) == plan
    model, _ = quantine.load(result.path)
    wanted = logits_of(with_weights(tiny(name), {}))
    assert float((logits_of(model) - wanted).std()) < 0.1 * float(wanted.std())


def test_a_shared_table_becomes_two(tiny: Tiny, short: Calibration, tmp_path: Path) -> None:
    out = quantine.quantize(tiny("llama_tied"), tmp_path / "out", rotated(), short).path
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    tensors = stored_tensors(out)
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert bool((tensors["model.norm.weight"] == 1).all())


def test_the_native_decoder_goes_on_as_the_float_model_does(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    out = quantine.quantize(tiny("llama_tied"), tmp_path / "out", rotated(), short).path
    model, _ = quantine.load(out)
    prompt = some_tokens(12, 1)
    options = {"max_new_tokens": 6, "do_sample": False}
    made = model.generate(prompt, **options)
    assert model.generate._kept is not None  # natively
    assert torch.equal(made, with_weights(tiny("llama_tied"), {}).generate(prompt, **options))


def test_rounded_activations_and_tuning_know_nothing_of_it(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    wanted = logits_of(with_weights(tiny("llama_tied"), {}))
    lost = []
    for transforms in ([], [{"rotate": {"seed": 7}}]):
        tune = {"steps": 1, "segments": 1, "block_steps": 1}
        fields = {**Plan.scheme("W8A8").as_dict(), "transforms": transforms, "tune": tune}
        out = tmp_path / f"out{len(lost)}"
        quantine.quantize(tiny("llama_tied"), out, Plan.from_dict(fields), short)
        model, _ = quantine.load(out)
        lost.append(float((logits_of(model) - wanted).std()))
    assert lost[1] < 1.3 * lost[0]


def test_a_run_that_is_continued_has_the_same_bytes(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    with stopped_at("block-00001"):
        quantine.quantize(tiny("qwen2"), tmp_path / "stopped", rotated(), short)
    assert list((tmp_path / "stopped").glob(f"{RUN_DIRECTORY}*"))
    other = rotated(transforms=[{"rotate": {"seed": 1}}])
    with pytest.raises(quantine.ResumeMismatch, match="plan"):
        quantine.quantize(tiny("qwen2"), tmp_path / "stopped", other, short, resume=True)
    for out in ("stopped", "whole"):
        quantine.quantize(tiny("qwen2"), tmp_path / out, rotated(), short, resume=True)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


@pytest.mark.parametrize(
    "wrong",
    ["rotate", ["spin"], ["rotate", "rotate"], [{"rotate": {"speed": 1}}], [{"rotate": 3}], [7]],
)
def test_other_transforms_are_refused(wrong: object) -> None:
    with pytest.raises(PlanError, match=r"transforms must be \[rotate\]"):
        rotated(transforms=wrong)


def test_seeds_are_checked() -> None:
    with pytest.raises(PlanError, match="seed must be 0 to"):
        rotated(transforms=[{"rotate": {"seed": -1}}])


def test_short_forms_rotate() -> None:
    assert plan_of("preset:gptq:bits=3:rotate=true").transforms == (Rotate(),)
    assert plan_of("scheme:W4A4:rotate=true").transforms == (Rotate(),)
    assert plan_of("3.3").transforms == ()
