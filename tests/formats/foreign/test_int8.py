"""compressed-tensors with int8 weights and activations: what is written, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantine import Calibration, FormatError, Plan, PlanError, quantize
from quantine.formats.export import export
from quantine.formats.finished import FinishedDirectory
from quantine.plan.targets import check_target
from quantine.run.prepare import prepare

Tiny = Callable[[str], Path]
TO = "compressed-tensors"
ROWS = {"match": "@blocks", "method": "rtn", "bits": 8, "group_size": -1, "sym": True}
INPUTS = {"norm": 8, "attention": 8, "hidden": 8, "token_factors": False}
TOKEN = {**INPUTS, "granularity": "token"}
TENSOR = {**INPUTS, "granularity": "tensor"}


def plan_of(activations: dict[str, Any], *rules: dict[str, Any]) -> Plan:
    return Plan.from_dict({"rules": [*rules, ROWS], "activations": activations})


@pytest.mark.parametrize("activations", [TOKEN, TENSOR], ids=["token", "tensor"])
def test_the_same_weights_and_grids(
    activations: dict[str, Any], tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    plan = plan_of(activations)
    job = prepare(tiny("llama"), plan, short)
    check_target(TO, job)
    out = quantize(tiny("llama"), tmp_path / "out", plan, short).path
    served = export(out, tmp_path / "ct", TO).path
    found, own = load_file(served / "model.safetensors"), FinishedDirectory(out)
    assert not [name for name in found if ".inputs." in name]
    for name in own.description.layers:
        weight, scale = found[f"{name}.weight"], found[f"{name}.weight_scale"]
        assert weight.dtype == torch.int8
        assert torch.equal(weight.float() * scale, own.qtensor(name).dequantize())
        assert (f"{name}.input_scale" in found) == (activations is TENSOR)
        if activations is TENSOR:
            assert torch.equal(
                found[f"{name}.input_scale"], own.kept_tensor(f"{name}.inputs.scale")
            )
            zero = found[f"{name}.input_zero_point"]
            assert zero.dtype == torch.int8
            assert torch.equal(zero + 128.0, own.kept_tensor(f"{name}.inputs.zero"))
    said = json.loads((served / "config.json").read_text())["quantization_config"]
    (group,) = said["config_groups"].values()
    assert said["format"] == group["format"] == "int-quantized"
    assert group["weights"]["strategy"] == "channel"
    inputs = group["input_activations"]
    assert (inputs["strategy"], inputs["dynamic"]) == (
        ("token", True) if activations is TOKEN else ("tensor", False)
    )


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of({**TOKEN, "hidden": 4}), "set hidden: 8"),
        (plan_of({**TOKEN, "key": 8}), "set key: 16"),
        (plan_of(INPUTS), "granularity: token or tensor"),
        (plan_of({**TENSOR, "token_factors": True}), "set token_factors: false"),
        (plan_of(TOKEN, {"match": "*.v_proj", "method": "keep"}), "v_proj is kept in floats"),
        (plan_of(TOKEN, {**ROWS, "match": "@head"}), "not that of the head"),
        (plan_of(TOKEN, {**ROWS, "match": "*.v_proj", "bits": 4}), "8 bits with sym: true"),
    ],
)
def test_plans_refuse_what_exports_refuse(
    plan: Plan, message: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    assert_refused_alike(tiny("llama"), plan, message, short, tmp_path)


def assert_refused_alike(
    model: Path, plan: Plan, message: str, short: Calibration, tmp_path: Path
) -> None:
    """The plan is refused before a run, and what a run made after it, and nothing is written."""
    job = prepare(model, plan, short)
    with pytest.raises(PlanError, match=message) as planned:
        check_target(TO, job)
    out = quantize(model, tmp_path / "out", plan, short).path
    with pytest.raises(FormatError) as exported:
        export(out, tmp_path / "ct", TO)
    assert str(exported.value) == str(planned.value)
    assert not (tmp_path / "ct").exists()


@pytest.mark.parametrize("activations", [TOKEN, TENSOR], ids=["token", "tensor"])
def test_what_is_not_rounded_here_would_be_rounded_there(
    activations: dict[str, Any], tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    """Of falcon, links are derived, and the input of one matrix of a block is left alone."""
    message = "the input of transformer.h.0.* is not known to be rounded"
    assert_refused_alike(tiny("falcon_old"), plan_of(activations), message, short, tmp_path)
