"""Matrices that make up for errors before them: which, by how much, and in whole runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantine
from quantine import Calibration, CalibrationError, Plan, PlanError
from quantine.calibrate.block_loader import BlockLoader
from quantine.calibrate.compensation import Compensation, may_write, predicted_best
from quantine.calibrate.segments import calibration_segments
from quantine.calibrate.sequential import Sequential
from quantine.core.tuning_spec import Tuning
from quantine.families import family_of
from quantine.families.layers import Layer, find_layers
from quantine.kernels.gram import add_gram
from quantine.run.estimate import estimate
from quantine.run.job import Job
from quantine.run.prepare import prepare
from quantine.run.progress import Silent
from quantine.statistics.error_fit import RIDGES, ErrorFit
from quantine.survey.specimen import specimen_config, write_specimen
from stopped_runs import stopped_at
from tiny_models import WIDTH, with_weights

Tiny = Callable[[str], Path]
RULES = [{"match": "@blocks", "method": "gptq", "bits": 2, "group_size": 16}]
PLAN = Plan.from_dict({"rules": RULES, "compensate": True})


@pytest.mark.parametrize(
    ("name", "writers"),
    [
        ("llama", ["self_attn.o_proj", "mlp.down_proj"]),
        ("opt", ["self_attn.out_proj", "fc2"]),
        ("phi3", ["self_attn.o_proj", "mlp.down_proj"]),
    ],
)
def test_candidates_are_alone_in_their_group(name: str, writers: list[str], tiny: Tiny) -> None:
    model = with_weights(tiny(name), {})
    family = family_of(model.config)
    found = [one.name for one in find_layers(model, family) if may_write(family, one, WIDTH)]
    first = [name.removeprefix(f"{family.blocks}.0.") for name in found if ".0." in name]
    assert sorted(first) == sorted(writers)


class Notes(Silent):
    """Keeps what a run says.

    Attributes:
        all: everything, as one text.
    """

    def __init__(self) -> None:
        self.all = ""

    def note(self, text: str) -> None:
        self.all += text


class Beside:
    """A tiny model at its second block, whose first has been made coarse, beside the float one."""

    def __init__(self, directory: Path, calibration: Calibration) -> None:
        self.job: Job = prepare(directory, PLAN, calibration)
        checkpoint = self.job.checkpoint()
        setup = self.job.calibration_setup(checkpoint)
        self.sequential, self.compensation = Sequential(setup), Compensation(setup, 0)
        loader = BlockLoader(self.job.model, self.job.family, checkpoint, self.job.device)
        for index in (0, 1):
            loader.load(index)
            self.compensation.advance(index)
            if index == 0:
                for layer in self._inside(0):
                    layer.write(self.job.model, self._coarse(layer.read(self.job.model)))
                self.sequential.advance(0)

    def _inside(self, index: int) -> list[Layer]:
        layers = [decision.layer for decision in self.job.scheme_layers()]
        return [layer for layer in layers if layer.block == index]

    @staticmethod
    def _coarse(weight: Tensor) -> Tensor:
        step = weight.abs().amax(1, keepdim=True) / 1.5
        return (weight / step).round() * step

    def layer(self, leaf: str) -> Layer:
        return next(one for one in self._inside(1) if one.name.endswith(leaf))

    def changed(self, leaf: str) -> tuple[Tensor, Tensor, float] | None:
        layer = self.layer(leaf)
        weight = layer.read(self.job.model)
        found = self.compensation.changed(self.sequential, layer, weight)
        assert torch.equal(layer.read(self.job.model), weight)  # the block is as it was
        return None if found is None else (weight, *found)


def test_a_change_takes_errors_off(tiny: Tiny, prose: Path) -> None:
    beside = Beside(tiny("llama"), Calibration(str(prose), 96, 64))
    found = beside.changed("down_proj")
    assert found is not None
    weight, changed, share = found
    assert 0.01 < share < 1
    assert not torch.equal(changed, weight)

    def error() -> float:
        outputs = beside.sequential.outputs(1)
        floats = beside.compensation._floats.hidden
        return sum(float((output - floats[i]).square().sum()) for i, output in enumerate(outputs))

    before = error()
    beside.layer("down_proj").write(beside.job.model, changed)
    assert error() < (1 - share / 2) * before


def test_what_does_not_write_or_takes_nothing_off_stays(tiny: Tiny, prose: Path) -> None:
    beside = Beside(tiny("opt"), Calibration(str(prose), 96, 64))
    assert beside.compensation.reaches(beside.layer("fc2"))
    assert not beside.compensation.reaches(beside.layer("fc1"))
    assert beside.changed("fc2") is not None
    # Errors that nothing predicts.
    floats, generator = beside.compensation._floats.hidden, torch.Generator().manual_seed(0)
    for batch, output in enumerate(beside.sequential.outputs(1)):
        floats[batch] = output + torch.randn(output.shape, generator=generator)
    assert beside.changed("fc2") is None


def test_tokens_that_went_far_astray_do_not_decide(tiny: Tiny, prose: Path) -> None:
    changes = []
    for astray in (0.0, 3.0):
        beside = Beside(tiny("llama"), Calibration(str(prose), 96, 64))
        floats, generator = beside.compensation._floats.hidden, torch.Generator().manual_seed(0)
        for batch in range(len(floats)):
            noise = torch.randn(floats[batch].shape, generator=generator)
            noise[:, torch.arange(noise.shape[1]) % 16 != 5] = 0
            scale = (beside.sequential.hidden[batch] - floats[batch]).square().mean().sqrt()
            floats[batch] = floats[batch] + astray * scale * noise
        found = beside.changed("down_proj")
        assert found is not None
        changes.append(found[1] - found[0])
    plain, with_noise = changes
    assert (with_noise - plain).norm() < 0.15 * plain.norm()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_ridge_is_that_which_takes_most_off_what_judges() -> None:
    x, wanted = normal(64, 24, seed=0), normal(8, 24, seed=1)

    def fit(errors: Tensor, inputs: Tensor) -> ErrorFit:
        found = ErrorFit(8, 24, add_gram, torch.device("cpu"))
        quiet = torch.zeros(len(inputs), dtype=torch.bool)
        found.update(inputs, errors, torch.ones(len(inputs)), quiet)
        return found

    others = normal(400, 24, seed=2)
    chosen = []
    for noise in (0.1, 6.0):
        learned = fit(x @ wanted.T + noise * normal(64, 8, seed=3), x)
        judging = fit(others @ wanted.T, others)
        taken = []
        for ridge in RIDGES:
            change = learned.change(ridge)
            assert change is not None
            taken.append(judging.taken_off(change))
        best = predicted_best(learned, judging)
        assert best == taken.index(max(taken))
        chosen.append(best)
    assert chosen[0] == 0 < chosen[1]
    # Errors that are the opposite of what was learned.
    assert predicted_best(learned, fit(-others @ wanted.T, others)) is None


def test_what_takes_nothing_off_when_the_block_runs_is_not_taken(
    prose: Path, tmp_path: Path
) -> None:
    # Norms after attention turn what is predicted into its opposite.
    write_specimen(specimen_config("gemma2"), tmp_path / "model")
    calibration = Calibration(str(prose), 64, 64)
    plan = Plan.from_dict({"rules": [{**RULES[0], "bits": 3, "group_size": 8}], "compensate": True})
    report = quantine.quantize(tmp_path / "model", tmp_path / "out", plan, calibration).report
    shares = {one["name"]: one["made_up"] for one in report["layers"] if "made_up" in one}
    assert 0.0 in shares.values()
    assert all(0 <= share < 1 for share in shares.values())
    assert sum(share > 0.05 for share in shares.values()) >= 2


@pytest.mark.parametrize("budget", [False, True])
def test_a_run_that_is_continued_has_the_same_bytes(
    budget: bool, tiny: Tiny, prose: Path, tmp_path: Path
) -> None:
    calibration = Calibration(str(prose), 64, 64)
    plan = replace(Plan.budget(3.0), compensate=True) if budget else PLAN

    def run(out: str, plan: Plan) -> Any:
        return quantine.quantize(tiny("llama"), tmp_path / out, plan, calibration, resume=True)

    with stopped_at("block-00001"):
        run("stopped", plan)
    results = [run(out, plan) for out in ("stopped", "whole")]
    made = [(one.path / "model.safetensors").read_bytes() for one in results]
    assert made[0] == made[1]
    plain = run("plain", replace(plan, compensate=False)).path / "model.safetensors"
    assert plain.read_bytes() != made[0]
    reports = {one["name"]: one.get("made_up") for one in results[0].report["layers"]}
    told = {name for name, share in reports.items() if share is not None}
    assert {name.rpartition(".")[2] for name in told} == {"o_proj", "down_proj"}
    assert any(reports[name] > 0 for name in told)


def test_hidden_states_of_both_models_are_predicted(tiny: Tiny, prose: Path) -> None:
    text = Calibration(str(prose), 64, 64)
    both, one = (prepare(tiny("llama"), replace(PLAN, compensate=c), text) for c in (True, False))
    assert estimate(both).activations == 2 * estimate(one).activations


def test_what_judges_tuning_is_not_compensated_on(tiny: Tiny, prose: Path) -> None:
    text = Calibration(str(prose), 64, 64)
    tuned = replace(PLAN, tune=Tuning())
    for plan in (PLAN, tuned):
        job = prepare(tiny("llama"), plan, text)
        limits = job.tokenizer, job.config.vocab_size, job.config.max_position_embeddings
        assert job.segments is not None
        assert job.segments.equal(calibration_segments(text, *limits, holds_out=True))
    plain = prepare(tiny("llama"), replace(tuned, compensate=False), text)
    assert plain.segments is not None
    assert plain.segments.equal(calibration_segments(text, *limits))


def test_lost_hidden_states_of_the_float_model_are_computed_again(
    tiny: Tiny, prose: Path, tmp_path: Path
) -> None:
    calibration = Calibration(str(prose), 64, 64)

    def run(out: str, **more: Any) -> bytes:
        made = quantine.quantize(tiny("llama"), tmp_path / out, PLAN, calibration, **more)
        return (made.path / "model.safetensors").read_bytes()

    with stopped_at("block-00001"):
        run("stopped")
    (states,) = (tmp_path / "stopped").rglob("float")
    shutil.rmtree(states)
    said = Notes()
    assert run("stopped", resume=True, progress=said) == run("whole")
    assert "the float model's hidden states of the unfinished run are missing" in said.all


def test_a_float_model_that_puts_out_no_numbers_is_named(
    tiny: Tiny, prose: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"].fill_(3e38)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CalibrationError, match="block 0 of the float model puts out non-finite"):
        quantine.quantize(
            tmp_path / "model", tmp_path / "out", PLAN, Calibration(str(prose), 64, 64)
        )


def test_plans_keep_it_and_others_do_not_name_it() -> None:
    assert Plan.from_dict(PLAN.as_dict()) == PLAN
    assert "compensate" not in Plan.preset("gptq").as_dict()


def test_what_could_not_make_up_for_anything_is_refused(
    tiny: Tiny, prose: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="no matrix sees the errors that `compensate`"):
        replace(PLAN, float_inputs=True)
    with pytest.raises(PlanError, match="compensate must be true or false"):
        Plan.from_dict({**PLAN.as_dict(), "compensate": 1})
    rounded = {"match": "@blocks", "method": "rtn", "bits": 4, "group_size": 16}
    readers = {**RULES[0], "match": "*.q_proj"}
    for rule in (rounded, readers, {**RULES[0], "match": "*.up_proj"}):
        plan = Plan.from_dict({"rules": [rule], "compensate": True})
        with pytest.raises(PlanError, match="compensate would change nothing"):
            quantine.quantize(
                tiny("llama"), tmp_path / "out", plan, Calibration(str(prose), 64, 64)
            )
    for samples, shards in ((63, 1), (64, 2)):
        calibration = Calibration(str(prose), samples, 64, shards=shards)
        with pytest.raises(
            CalibrationError, match=r"at least 4096 tokens .* several samples and one"
        ):
            quantine.quantize(tiny("llama"), tmp_path / "out", PLAN, calibration)
    assert not (tmp_path / "out").exists()


def test_mixtures_make_up_with_what_all_tokens_pass(prose: Path, tmp_path: Path) -> None:
    write_specimen(specimen_config("mixtral"), tmp_path / "mixture")
    calibration = Calibration(str(prose), 64, 64)
    plan = Plan.from_dict({"rules": [{**RULES[0], "bits": 4, "group_size": 8}], "compensate": True})
    report = quantine.quantize(tmp_path / "mixture", tmp_path / "out", plan, calibration).report
    told = {one["name"].rpartition(".")[2] for one in report["layers"] if "made_up" in one}
    assert told == {"o_proj"}
