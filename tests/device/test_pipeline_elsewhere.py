"""Whole runs of `quantize` on a device that refuses tensors of the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from other_device import NAME, OtherDevice, no_extension, untouched_extension
from quantine import Calibration, Plan, quantize
from quantine.run.progress import Silent
from tiny_models import stored_tensors

Tiny = Callable[[str], Path]

BOTH_AXES = {
    "rules": [
        {
            "match": "@blocks",
            "method": "adadim",
            "choices": [
                {"method": "gptq", "bits": 4, "group_size": 16, "group_axis": axis}
                for axis in ("in", "out")
            ],
        }
    ]
}
PLANS: dict[str, Callable[[], Plan]] = {
    "rtn": lambda: Plan.preset("rtn", bits=4, group_size=32),
    "gptq": lambda: Plan.preset("gptq", bits=3, group_size=32),
    "spqr": lambda: Plan.preset("spqr", bits=3, group_size=16),
    "adadim": lambda: Plan.from_dict(BOTH_AXES),
    "W4A8": lambda: Plan.scheme("W4A8"),
    "W4A4KV": lambda: Plan.scheme("W4A4KV"),
}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama", "rtn"),
        ("llama", "spqr"),
        ("llama", "adadim"),
        ("llama", "W4A4KV"),
        ("opt", "gptq"),
        ("opt", "W4A8"),
    ],
)
def test_a_run_there_writes_what_references_write_here(
    model: str, name: str, tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    plan, short = PLANS[name](), Calibration(str(text_file), samples=2, seqlen=16)
    if plan.activations is not None:
        pytest.importorskip("sklearn")
    with no_extension():
        quantize(tiny(model), tmp_path / "here", plan, short)
    with OtherDevice(), untouched_extension():
        quantize(tiny(model), tmp_path / "there", plan, short, device=NAME)
    here, there = stored_tensors(tmp_path / "here"), stored_tensors(tmp_path / "there")
    assert list(here) == list(there)
    errors = [report(tmp_path / out) for out in ("here", "there")]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
    same = sum(int((here[n] == there[n]).sum()) for n in here if here[n].shape == there[n].shape)
    # Attention rounds otherwise, which tips a code now and then.
    assert same > 0.98 * sum(tensor.numel() for tensor in here.values())


def report(out: Path) -> list[Any]:
    """The output errors of all layers."""
    layers = json.loads((out / "quantine_report.json").read_text())["layers"]
    return [layer["output_error"] for layer in layers]


def test_a_run_there_can_be_resumed(tiny: Tiny, short: Calibration, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(*_: Any) -> Any:
        raise Stopped

    plan = PLANS["gptq"]()
    with OtherDevice(), untouched_extension():
        quantize(tiny("llama"), tmp_path / "whole", plan, short, device=NAME)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Silent, "block", stop)
            with pytest.raises(Stopped):
                quantize(tiny("llama"), tmp_path / "cut", plan, short, device=NAME)
        quantize(tiny("llama"), tmp_path / "cut", plan, short, device=NAME, resume=True)
    whole, cut = stored_tensors(tmp_path / "whole"), stored_tensors(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
