"""SpQR on every family: what was solved is stored, loaded and run; budgets hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantine
from quantine import Calibration, Plan
from quantine.formats.inventory import inventory
from quantine.runtime.packed import packed_modules
from stopped_runs import stopped_at
from tiny_models import FAMILIES, bits_equal, logits_of, matrices_of, stored_tensors, with_weights

Tiny = Callable[[str], Path]
every_family = pytest.mark.parametrize("name", FAMILIES)

VARIANTS: list[dict[str, Any]] = [
    {"bits": 3, "group_size": 16, "threshold": 0.3},
    {"bits": 4, "group_size": 8, "outliers": 0.02, "groups": "refit", "scale_bits": 4},
    {"bits": 2, "group_size": 16, "sym": True, "stat_group_size": 5, "threshold": 0.2},
    {"bits": 3, "group_size": 16, "zero_bits": 3, "stat_group_size": 16, "clip": "minmax"},
    {"bits": 5, "group_size": -1, "scale_bits": 16, "zero_bits": 16, "groups": "static"},
    {"bits": 6, "group_size": 32, "stat_group_size": -1, "threshold": "inf", "act_order": False},
]
CHOICES = [
    {"method": "spqr", "bits": bits, "group_size": 16, "threshold": threshold}
    for bits, threshold in ((2, "inf"), (3, 0.5), (4, 0.3), (6, 0.3))
]


def varied_rules(directory: Path) -> list[dict[str, Any]]:
    """One rule for each matrix; over a model every one of `VARIANTS` occurs."""
    return [
        {"match": name, "method": "spqr", **VARIANTS[index % len(VARIANTS)]}
        for index, name in enumerate(matrices_of(directory))
    ]


def budget(bits: float) -> Plan:
    return Plan.from_dict(
        {
            "bits_per_weight": bits,
            "choices": CHOICES,
            "rules": [{"match": "@blocks", "method": "search"}],
        }
    )


@every_family
def test_the_packed_model_is_the_float_model_with_the_solved_weights(
    name: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    plan = Plan.from_dict({"rules": varied_rules(tiny(name))})
    report = quantine.quantize(tiny(name), tmp_path / "out", plan, short).report
    assert sum(layer["outliers"] for layer in report["layers"]) > 0
    model, _ = quantine.load(tmp_path / "out", torch.float32, "exact")
    weights = {path: module.dequantize() for path, module in packed_modules(model)}
    assert len(weights) == len(report["layers"])
    expected = logits_of(with_weights(tiny(name), weights))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


@every_family
def test_bytes_are_counted_from_the_file(
    name: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    plan = Plan.from_dict({"rules": varied_rules(tiny(name))})
    report = quantine.quantize(tiny(name), tmp_path / "out", plan, short).report
    found = inventory(tmp_path / "out")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    totals = found["totals"]
    assert totals["quantized_bytes"] + totals["kept_bytes"] + totals["header_bytes"] == size
    assert totals["quantized_bytes"] == sum(layer["bytes"] for layer in report["layers"])
    tensors = stored_tensors(tmp_path / "out")
    for layer in report["layers"]:
        values = tensors.get(f"{layer['name']}.outlier_value")
        assert layer["outliers"] == (0 if values is None else len(values))


def test_an_average_is_what_each_matrix_takes(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    plan = Plan.preset("spqr", bits=3, average_bits=4.5)
    report = quantine.quantize(tiny("llama"), tmp_path / "out", plan, short).report
    for layer in report["layers"]:
        assert layer["outliers"] > 0
        assert layer["bits_per_weight"] == pytest.approx(4.5, abs=0.25)  # small matrices are lumpy
    assert report["totals"]["bits_per_weight"] == pytest.approx(4.5, abs=0.1)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma3", "falcon_alibi"])
def test_a_budget_holds_and_more_of_it_is_spent(
    name: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    taken = []
    for bits in (3.2, 4.8):
        out = tmp_path / str(bits)
        report = quantine.quantize(tiny(name), out, budget(bits), short).report
        taken.append(report["totals"]["bits_per_weight"])
        assert taken[-1] <= bits  # counted from what was written
        widths = {layer["scheme"]["bits"] for layer in report["layers"]}
        assert widths <= {2, 3, 4, 6}
        model, _ = quantine.load(out)
        assert bool(torch.isfinite(logits_of(model)).all())
    # Tiny matrices have few steps to spend a budget in.
    assert taken[0] + 0.5 < taken[1]


def test_a_budget_holds_though_more_outliers_are_found_than_predicted(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    plan = {
        "bits_per_weight": 3.513,  # hardly more than the least that is not refused
        "choices": [{"method": "spqr", "bits": 3}],
        "rules": [{"match": "@blocks", "method": "search"}],
    }
    result = quantine.quantize(tiny("llama"), tmp_path / "out", Plan.from_dict(plan), short)
    assert result.report["totals"]["bits_per_weight"] <= 3.513
    assert any(layer["outliers"] == 0 for layer in result.report["layers"])


def test_a_budget_that_outliers_exceed_is_refused_before_anything_is_solved(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    choice = {"method": "spqr", "bits": 2, "group_size": 16, "outliers": 0.3}
    plan = {
        "bits_per_weight": 4.0,
        "choices": [choice],
        "rules": [{"match": "@blocks", "method": "search"}],
    }
    with pytest.raises(quantine.PlanError, match="the smallest choices take at least 9"):
        quantine.quantize(tiny("llama"), tmp_path / "out", Plan.from_dict(plan), short)


def test_an_interrupted_budget_ends_with_the_same_bytes(
    tiny: Tiny, short: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantine.quantize(tiny("llama"), tmp_path / "whole", budget(3.6), short)
    with stopped_at("block-00001"):
        quantine.quantize(tiny("llama"), tmp_path / "out", budget(3.6), short)

    def no_second_probe(*_: object) -> None:
        raise AssertionError("probed again")

    with monkeypatch.context() as patched:
        patched.setattr("quantine.run.stages.probe", no_second_probe)
        again = quantine.quantize(tiny("llama"), tmp_path / "out", budget(3.6), short, resume=True)
    schemes = [[layer["scheme"] for layer in run.report["layers"]] for run in (whole, again)]
    assert schemes[0] == schemes[1]
    one, other = stored_tensors(whole.path), stored_tensors(again.path)
    assert one.keys() == other.keys()
    assert all(bits_equal(one[key], other[key]) for key in one)


def test_bfloat16_calibration_changes_little_and_is_part_of_the_run(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    plan = Plan.preset("spqr", bits=4)
    faster = Calibration(short.source, short.samples, short.seqlen, short.seed, bfloat16=True)
    runs = [
        quantine.quantize(tiny("llama"), tmp_path / str(index), plan, calibration)
        for index, calibration in enumerate((short, faster))
    ]
    errors = [sum(layer["output_error"] for layer in run.report["layers"]) for run in runs]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    with pytest.raises(quantine.ResumeMismatch, match="calibration bfloat16"):
        quantine.quantize(tiny("llama"), tmp_path / "0", plan, faster, resume=True)
    stored = json.loads((tmp_path / "1" / "quantine_report.json").read_text())
    assert stored["calibration"]["bfloat16"] is True
