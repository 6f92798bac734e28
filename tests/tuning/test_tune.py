"""Tuned runs: closer to the float model, resumable, and refused where they would not work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import quantine
from quantine import Calibration, Plan
from quantine.core.tuning_spec import SETTINGS, Tuning, tuning_from
from quantine.errors import CheckpointError, PlanError
from quantine.formats.directory import MAPS
from quantine.plan.rules import rule_from
from quantine.run.estimate import estimate
from quantine.run.prepare import prepare
from quantine.run.progress import Silent
from quantine.run.store import RunStore
from quantine.run.tuning_cost import tuning_bytes
from quantine.survey.specimen import specimen_config, write_specimen
from quantine.tuning.part import pace
from tiny_models import build, logits_of, loud_states, some_tokens, stored_tensors, tiny_config

EXAMPLES = Path(__file__).parents[2] / "examples"
RULES = Plan.preset("gptq", bits=3, group_size=32).rules
LOW_TABLE = rule_from(
    {"match": "@embedding", "method": "rtn", "bits": 3, "group_size": -1}, "embedding"
)
TUNING = Tuning(steps=12, segments=4, rate=2e-3, block_steps=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tiny_config("llama"), tmp_path_factory.mktemp("float") / "model")


@pytest.fixture(scope="module")
def calibration(prose: Path) -> Calibration:
    return Calibration(str(prose), samples=16, seqlen=64)


def float_model(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def divergence_of(directory: Path, model: Path, tokens: Tensor) -> float:
    with torch.no_grad():
        expected = logits_of(float_model(model), tokens).float().log_softmax(-1)
        found = logits_of(quantine.load(directory)[0], tokens).float().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize(
    ("plan", "block_steps"),
    [(Plan.preset("spqr", bits=3), 6), (Plan.preset("gptq", bits=3, group_size=32), 0)],
    ids=["with codes", "without"],
)
def test_a_tuned_model_is_closer_to_the_float_model(
    plan: Plan, block_steps: int, model: Path, tmp_path: Path, calibration: Calibration
) -> None:
    quantine.quantize(model, tmp_path / "plain", plan, calibration)
    # At a smaller rate, six steps leave every code where it was.
    tuned = replace(plan, tune=replace(TUNING, rate=4e-3, block_steps=block_steps))
    report = quantine.quantize(model, tmp_path / "tuned", tuned, calibration).report
    outcome = report["tuning"]
    assert outcome["divergence"] < outcome["divergence_before"]
    assert (outcome.get("divergence_after_blocks") is None) == (block_steps == 0)
    assert (outcome["codes_moved"] == 0) == (block_steps == 0)
    tokens = some_tokens(64, 4)
    plain_one, tuned_one = tmp_path / "plain", tmp_path / "tuned"
    assert divergence_of(tuned_one, model, tokens) < divergence_of(plain_one, model, tokens)
    before, after = stored_tensors(tmp_path / "plain"), stored_tensors(tmp_path / "tuned")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    codes = [name for name in before if name.endswith(".codes")]
    assert codes
    same = all(torch.equal(before[name], after[name]) for name in codes)
    assert same == (block_steps == 0)
    maps = [load_file(tmp_path / out / MAPS) for out in ("plain", "tuned")]
    assert maps[0]
    assert maps[0].keys() == maps[1].keys()


@pytest.mark.parametrize(
    ("plan", "rounded"),
    [
        (Plan.preset("spqr", bits=3).with_head(4), 1e-4),
        (Plan((*RULES, rule_from({"match": "@head", "method": "rtn", "bits": 6}, "head"))), 1e-4),
        (Plan((LOW_TABLE, rule_from({"match": "@head", "method": "keep"}, "head"), *RULES)), 1e-4),
        # This layout stores outliers as differences, which are rounded once more.
        (Plan.from_file(EXAMPLES / "spqr-format.yaml"), 1e-3),
    ],
    ids=["tied table", "untied head", "float head", "spqr layout"],
)
def test_files_hold_what_was_judged(
    plan: Plan, rounded: float, tmp_path: Path, calibration: Calibration
) -> None:
    model = build(tiny_config("llama", tie_word_embeddings=True), tmp_path / "model")
    tuned = replace(plan, tune=replace(TUNING, steps=4), arithmetic="exact")
    report = quantine.quantize(model, tmp_path / "out", tuned, calibration).report
    assert report["tuning"]["steps"] > 0
    text = prepare(model, tuned, calibration).tuning_text
    assert text is not None
    found = divergence_of(tmp_path / "out", model, text.judges)
    assert found == pytest.approx(report["tuning"]["divergence"], rel=rounded)


def test_a_run_stopped_while_parts_were_tuned_ends_with_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: Calibration
) -> None:
    plan = replace(Plan.preset("spqr", bits=3), tune=replace(TUNING, steps=2))
    quantine.quantize(model, tmp_path / "whole", plan, calibration)
    commit = RunStore.commit

    def stopping(self: RunStore, part: str, *rest: object) -> None:
        if part == "tuned-block-00001":
            raise KeyboardInterrupt
        commit(self, part, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(RunStore, "commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        quantine.quantize(model, tmp_path / "stopped", plan, calibration)
    monkeypatch.undo()
    quantine.quantize(model, tmp_path / "stopped", plan, calibration, resume=True)
    whole, again = stored_tensors(tmp_path / "whole"), stored_tensors(tmp_path / "stopped")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_stopped_while_blocks_were_tuned_goes_on_after_the_last(
    model: Path, tmp_path: Path, calibration: Calibration
) -> None:
    plan = replace(Plan.preset("spqr", bits=3), tune=replace(TUNING, steps=2))
    quantine.quantize(model, tmp_path / "whole", plan, calibration)

    class Stopping(Silent):
        def note(self, text: str) -> None:
            if text.startswith("tuned block 0"):
                raise KeyboardInterrupt

    heard: list[str] = []

    class Hearing(Silent):
        def note(self, text: str) -> None:
            heard.append(text)

    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        quantine.quantize(model, stopped, plan, calibration, progress=Stopping())
    quantine.quantize(model, stopped, plan, calibration, progress=Hearing(), resume=True)
    said = [line for line in heard if "tuned" in line and "block " in line]
    assert said[0] == "block 0 is tuned already"
    assert said[1].startswith("tuned block 1: ")
    whole, again = stored_tensors(tmp_path / "whole"), stored_tensors(stopped)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_source_that_changed_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: Calibration
) -> None:
    model = build(tiny_config("llama"), tmp_path / "model")
    plan = replace(Plan.preset("rtn", bits=4, group_size=32), tune=replace(TUNING, steps=1))
    commit = RunStore.commit

    def changing(self: RunStore, part: str, *rest: Any) -> None:
        commit(self, part, *rest)
        if part == "block-00001":
            tensors = load_file(model / "model.safetensors")
            save_file(
                {n: t + (n == "model.norm.weight") for n, t in tensors.items()},
                model / "model.safetensors",
                {"format": "pt"},
            )

    monkeypatch.setattr(RunStore, "commit", changing)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* not what this run read"):
        quantine.quantize(model, tmp_path / "out", plan, calibration)


def test_numbers_that_became_worse_are_put_back(
    model: Path, tmp_path: Path, calibration: Calibration
) -> None:
    wild = replace(
        Plan.preset("gptq", bits=4, group_size=32),
        tune=Tuning(steps=1, segments=1, rate=0.1, block_steps=2),
    )
    report = quantine.quantize(model, tmp_path / "wild", wild, calibration).report
    quantine.quantize(model, tmp_path / "plain", replace(wild, tune=None), calibration)
    assert report["tuning"]["steps"] == 0
    assert report["tuning"]["divergence"] == report["tuning"]["divergence_before"]
    plain, kept = stored_tensors(tmp_path / "plain"), stored_tensors(tmp_path / "wild")
    assert [name for name in plain if not torch.equal(plain[name], kept[name])] == []


def test_a_plan_says_how_it_is_tuned() -> None:
    plan = replace(Plan.preset("spqr"), tune=TUNING)
    assert Plan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan
    assert tuning_from("quick", "here") is SETTINGS["quick"]
    assert tuning_from(None, "here") is None


@pytest.mark.parametrize(
    "value",
    [
        "fast",
        {"steps": 0},
        {"block_steps": -1},
        {"steps": True},
        {"rate": 0},
        {"rate": "1"},
        {"pace": 1},
        3,
    ],
)
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(PlanError, match="tune"):
        tuning_from(value, "here")


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("llama", "W3A3KV"),
        ("llama", "W4A4-strict-rotated"),
        ("loud", "W3A3KV-rotated-mixed"),
        ("opt", "W4A8"),
        ("llama", "W4A8-token"),
    ],
)
def test_models_that_round_activations_are_tuned_as_they_compute(
    family: str, scheme: str, tmp_path: Path, calibration: Calibration
) -> None:
    loud = family == "loud"
    model = tmp_path / "model"
    model = loud_states(model) if loud else build(tiny_config(family), model)
    plan = replace(Plan.scheme(scheme), tune=replace(TUNING, steps=4), arithmetic="exact")
    report = quantine.quantize(model, tmp_path / "out", plan, calibration).report
    outcome = report["tuning"]
    assert outcome["divergence"] < outcome["divergence_before"]
    text = prepare(model, plan, calibration).tuning_text
    assert text is not None
    found = divergence_of(tmp_path / "out", model, text.judges)
    assert found == pytest.approx(outcome["divergence"], rel=1e-2)
    leaves = {name.rpartition(".")[2] for name in stored_tensors(tmp_path / "out")}
    assert not loud or {"head_reach", "widths"} <= leaves


def test_grids_of_activations_are_tuned_too(
    model: Path, tmp_path: Path, calibration: Calibration
) -> None:
    plan = Plan.scheme("W4A4")
    quantine.quantize(model, tmp_path / "plain", plan, calibration)
    tuned = replace(plan, tune=replace(TUNING, block_steps=0))
    quantine.quantize(model, tmp_path / "tuned", tuned, calibration)
    before, after = stored_tensors(tmp_path / "plain"), stored_tensors(tmp_path / "tuned")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inside = "model.layers.0.self_attn"
    for leaf in ("sites.key.scale", "sites.key.zero", "sites.value.scale", "q_proj.inputs.scale"):
        assert f"{inside}.{leaf}" in changed
    assert not [name for name in changed if name.endswith(("labels", "feedback", "inputs.zero"))]
    # What matrices read together is rounded once.
    for leaf in ("scale", "zero", "reach"):
        grids = [after.get(f"{inside}.{part}_proj.inputs.{leaf}") for part in "qkv"]
        assert all(grid is grids[0] or torch.equal(grid, grids[0]) for grid in grids)


def test_a_plan_without_matrices_to_tune_is_refused(model: Path, calibration: Calibration) -> None:
    activations = {"norm": 8}
    plan = Plan.from_dict({"rules": [], "activations": activations, "tune": {"steps": 2}})
    with pytest.raises(PlanError, match="no matrix that could be tuned"):
        prepare(model, plan, calibration)


def test_grids_that_tuning_does_not_know_are_refused(
    model: Path, tmp_path: Path, prose: Path
) -> None:
    rule = {"match": "@blocks", "method": "rtn", "bits": 4, "group_size": 32, "signed": True}
    rule |= {"sym": True, "format": "ggml"}
    plan = Plan.from_dict({"rules": [rule], "tune": {"steps": 2}})
    with pytest.raises(
        PlanError, match=r"layers\.0\.\S+: grids of llama.cpp's types are not tuned"
    ):
        prepare(model, plan, Calibration(str(prose), samples=2, seqlen=32))
    rule = {"match": "@blocks", "method": "rtn", "bits": 4, "group_size": 32}
    plan = Plan.from_dict({"rules": [rule], "tune": {"steps": 2}})
    write_specimen(specimen_config("qwen3_moe"), tmp_path / "mixture")
    with pytest.raises(PlanError, match=r"experts\.0\.\S+: mixtures of experts are not tuned yet"):
        prepare(tmp_path / "mixture", plan, Calibration(str(prose), samples=2, seqlen=32))


def test_the_rate_rises_and_falls() -> None:
    paces = [pace(step, 40) for step in range(1, 41)]
    assert max(paces) == paces[3] == 1
    assert 0 < paces[0] < 1
    assert 0 < paces[-1] < 0.01


def test_a_plan_predicts_what_tuning_takes(model: Path, calibration: Calibration) -> None:
    plain = Plan.preset("spqr", bits=3)
    few, many = (replace(plain, tune=replace(TUNING, steps=steps)) for steps in (20, 1000))
    jobs = [prepare(model, plan, calibration) for plan in (plain, few, many)]
    costs = [estimate(job) for job in jobs]
    assert costs[0].tuning_seconds is None
    assert costs[1].tuning_seconds is not None
    assert costs[2].tuning_seconds is not None
    assert 0 < costs[1].tuning_seconds < costs[2].tuning_seconds
    # The peak of a process may lie in what it did before.
    assert costs[0].peak_memory <= costs[1].peak_memory
    assert tuning_bytes(jobs[0]) == 0 < tuning_bytes(jobs[1])
