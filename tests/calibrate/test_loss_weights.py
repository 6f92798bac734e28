"""Tokens that count by the loss: against one backward pass, in Hessians, and in runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

import quantine
from quantine import Calibration, CalibrationError, Plan, PlanError
from quantine.calibrate.backward import draw
from quantine.calibrate.block_loader import BlockLoader
from quantine.calibrate.loss_weights import POWER, loss_weights
from quantine.core.stage_times import StageTimes
from quantine.kernels.gram import add_gram
from quantine.run.block import SolvedBlock
from quantine.run.layer import Solved, solve_choice
from quantine.run.prepare import prepare
from quantine.run.quantize import carry_out
from quantine.statistics.hessian import Hessian
from quantine.statistics.output_covariance import OutputCovariance, reordered
from quantine.survey.specimen import specimen_config, write_specimen
from samples import random_weight
from stopped_runs import stopped_at
from tiny_models import with_weights

Tiny = Callable[[str], Path]
SEED = 3
RULES = [{"match": "@blocks", "method": "spqr", "bits": 3, "group_size": 16}]


def weighted(**fields: Any) -> Plan:
    return Plan.from_dict({"rules": RULES, "loss_weights": True, **fields})


def at_once(
    model: Any, segments: Tensor, names: list[str]
) -> tuple[dict[str, Tensor], dict[str, OutputCovariance]]:
    """Mean squared gradients of each token, and second moments, by one pass through the model."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    moments = {name: OutputCovariance() for name in names}

    def watch(name: str) -> Callable[..., None]:
        def keep(gradient: Tensor) -> None:
            found[name].append(gradient.square().mean(-1).flatten())
            moments[name].update(gradient)

        return lambda _module, _inputs, output: output.register_hook(keep) and None

    for name in names:
        model.get_submodule(name).register_forward_hook(watch(name))
    generator = torch.Generator().manual_seed(SEED)
    for segment in segments:
        logits = model(input_ids=segment.unsqueeze(0), use_cache=False).logits[0]
        drawn = draw(logits.detach().softmax(-1), generator)[:, 0]
        cross_entropy(logits, drawn, reduction="sum").backward()
    return {name: torch.cat(parts) for name, parts in found.items()}, moments


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_weights_are_those_of_the_whole_model(
    name: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    job = prepare(tiny(name), weighted(), short)
    checkpoint = job.checkpoint()
    loader = BlockLoader(job.model, job.family, checkpoint, job.device)
    layers = [decision.layer for decision in job.scheme_layers()]
    read, setup = partial(job.read, checkpoint), job.calibration_setup(checkpoint)
    couplings: dict[str, Tensor] = {}

    def keep(_: int, found: dict[str, Tensor]) -> None:
        couplings.update(found)

    found = loss_weights(setup, loader, layers, read, tmp_path, SEED, lambda _: None, keep)
    assert job.segments is not None
    squares, moments = at_once(
        with_weights(tiny(name), {}), job.segments, [one.name for one in layers]
    )
    assert set(found) == set(squares) == set(couplings)
    for layer, weights in found.items():
        wanted = squares[layer] ** POWER
        torch.testing.assert_close(weights, wanted / wanted.mean(), rtol=5e-3, atol=1e-4)
        torch.testing.assert_close(
            couplings[layer], moments[layer].coupling(), rtol=5e-3, atol=1e-3
        )


def test_a_hessian_sums_weighted_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(5, 8, 6, generator=generator), torch.rand(40, generator=generator)
    hessian = Hessian(6, add_gram)
    hessian.update(x, weights)
    rows = x.reshape(-1, 6).double()
    wanted = (rows.T * weights.double()) @ rows
    torch.testing.assert_close(hessian.matrix.double(), wanted, rtol=1e-5, atol=1e-5)
    assert hessian.tokens == 40


@pytest.mark.parametrize(("budget", "damaged"), [(False, False), (False, True), (True, False)])
def test_a_run_that_is_continued_has_the_same_bytes(
    budget: bool, damaged: bool, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    plan = Plan.budget(3.6).as_dict() | {"loss_weights": True} if budget else weighted().as_dict()

    def run(out: str, plan: dict[str, Any]) -> Path:
        options = {"resume": True}
        return quantine.quantize(
            tiny("llama"), tmp_path / out, Plan.from_dict(plan), short, **options
        ).path

    with stopped_at("block-00001"):
        run("stopped", plan)
    (later,) = (tmp_path / "stopped").rglob("couplings-00001.safetensors")
    if damaged:  # all is found anew
        save_file({k: v * 0 for k, v in load_file(later).items()}, later)
    made = [(run(out, plan) / "model.safetensors").read_bytes() for out in ("stopped", "whole")]
    assert made[0] == made[1]
    plain = run("plain", {**plan, "loss_weights": False}) / "model.safetensors"
    assert plain.read_bytes() != made[0]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "neox_parallel", "phi3"])
def test_outputs_make_up_for_each_other_in_the_order_that_activations_give_them(
    name: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    job = prepare(tiny(name), Plan.scheme("W4A8", loss_weights=True), short)
    checkpoint = job.checkpoint()
    moved = []

    def compare(block: SolvedBlock) -> Sequence[Solved]:
        (stored,) = (tmp_path / "out").rglob(f"couplings-{block.index:05}.safetensors")
        before = load_file(stored)
        assert set(before) == set(block.hessians)
        for one in block.solved:
            # Rows are known by their numbers, whatever the order of their columns.
            floats = job.float_weight(checkpoint, one.layer).sort(1).values
            rows = block.weights[one.layer.name].sort(1).values
            order = (rows.unsqueeze(1) == floats).all(2).float().argmax(1)
            assert torch.equal(floats[order], rows)
            moved.append(one.layer.name if (order.diff() != 1).any() else "")
            coupling = block.hessians[one.layer.name].coupling
            assert coupling is not None
            wanted = reordered(before[one.layer.name].float(), order)
            torch.testing.assert_close(coupling, wanted, rtol=1e-4, atol=1e-5)
        return block.solved

    carry_out(job, tmp_path / "out", adjust=compare)
    assert any(moved)


@pytest.mark.parametrize("weighs", [False, True])
def test_budgets_rank_choices_by_more_text_where_all_has_gradients(
    weighs: bool, tiny: Tiny, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[int, int, bool]] = []

    def told(samples: int, seqlen: int, weighted: bool) -> int:
        said.append((samples, seqlen, weighted))
        return 1

    monkeypatch.setattr("quantine.budget.probe.probe_segments", told)
    plan = replace(Plan.budget(3.6), loss_weights=weighs)
    quantine.quantize(tiny("llama"), tmp_path / "out", plan, Calibration(str(prose), 8, 32))
    assert said == [(8, 32, weighs)]


def test_plans_keep_them_and_others_do_not_name_them() -> None:
    assert Plan.from_dict(weighted().as_dict()) == weighted()
    assert "loss_weights" not in Plan.preset("gptq").as_dict()


def test_what_cannot_be_weighted_is_refused(tiny: Tiny, prose: Path, tmp_path: Path) -> None:
    rounded = weighted(rules=[{"match": "@blocks", "method": "rtn", "bits": 4, "group_size": 16}])
    with pytest.raises(PlanError, match="loss_weights would change nothing"):
        quantine.quantize(tiny("llama"), tmp_path / "out", rounded, Calibration(str(prose), 4, 64))
    few = {0: rounded, 2: weighted()}
    for shards, plan in few.items():
        calibration = Calibration(str(prose), 2 * shards, 64, shards=max(1, shards))
        with pytest.raises(CalibrationError, match="in one shard"):
            quantine.quantize(tiny("llama"), tmp_path / "out", plan, calibration)
    write_specimen(specimen_config("mixtral"), tmp_path / "mixture")
    with pytest.raises(PlanError, match="not known for experts"):
        quantine.quantize(
            tmp_path / "mixture", tmp_path / "out", weighted(), Calibration(str(prose), 4, 64)
        )
    assert not (tmp_path / "out").exists()


def test_choices_are_compared_before_outputs_make_up_for_each_other(
    tiny: Tiny, short: Calibration
) -> None:
    rule = {"match": "@blocks", "method": "adadim", "inner": "gptq", "objective": "hessian"}
    plan = Plan.from_dict({"rules": [{**rule, "bits": 3, "group_size": 16}]})
    decision = prepare(tiny("llama"), plan, short).scheme_layers()[0]
    weight = random_weight(decision.layer.out_features, decision.layer.in_features)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(99, weight.shape[1], generator=generator)

    def solved(coupling: Tensor | None) -> Solved:
        hessian = Hessian(weight.shape[1], add_gram)
        hessian.update(rows)
        hessian.coupling = coupling
        return solve_choice(decision, weight, hessian, {}, StageTimes())

    covariance = OutputCovariance()
    few = torch.randn(weight.shape[1], len(weight), generator=generator)
    covariance.update(rows[:, :4] @ few[:4])
    alone, together = solved(None), solved(covariance.coupling())
    assert together.choice == alone.choice
    assert not torch.equal(together.qtensor.codes, alone.qtensor.codes)
