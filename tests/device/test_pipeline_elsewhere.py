"""Whole runs of `quantize` on a device that refuses tensors of the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from other_device import NAME, OtherDevice, no_extension, untouched_extension, without_float64
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
    ],
)
def test_a_run_there_writes_what_references_write_here(
    model: str, name: str, tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    plan, short = PLANS[name](), Calibration(str(text_file), samples=2, seqlen=16)
    if plan.activations is not None:
        pytest.importorskip("sklearn")
    # The CPU has attention of its own, which rounds otherwise.
    with no_extension(), sdpa_kernel(SDPBackend.MATH):
        quantize(tiny(model), tmp_path / "here", plan, short)
    with OtherDevice(), untouched_extension(), without_float64():
        quantize(tiny(model), tmp_path / "there", plan, short, device=NAME)
    here, there = stored_tensors(tmp_path / "here"), stored_tensors(tmp_path / "there")
    assert list(here) == list(there)
    for tensor_name, tensor in here.items():
        assert torch.equal(there[tensor_name], tensor), tensor_name
    assert layers_of(tmp_path / "there") == layers_of(tmp_path / "here")


def layers_of(out: Path) -> list[dict[str, Any]]:
    """What the report says of each layer, but for times."""
    layers = json.loads((out / "quantine_report.json").read_text())["layers"]
    return [{key: value for key, value in layer.items() if key != "seconds"} for layer in layers]


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
