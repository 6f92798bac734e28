"""What plans say of a device's memory, against the bytes that live there during a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_memory import Meter, metered
from other_device import NAME, OtherDevice
from quantine import Calibration, DeviceMemoryError, Plan, quantize
from quantine.run import residence
from quantine.run.estimate import Estimate, estimate
from quantine.run.peak import WORKSPACE, device_bytes
from quantine.run.prepare import prepare
from quantine.run.progress import Silent
from quantine.run.residence import DEVICE_SHARE, residences
from quantine.run.store import AT_ONCE
from quantine.run.working_set import working_set
from samples import quick
from tiny_models import build, tiny_config

Tiny = Callable[[str], Path]

DEMO = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 2048,
    "max_position_embeddings": 256,
    "num_hidden_layers": 1,
}
"""A block of the demo model."""
CHOICES = [
    {"method": "rtn", "bits": 4, "group_size": 16, "group_axis": axis} for axis in ("in", "out")
]
PLANS: dict[str, Callable[[], Plan]] = {
    "rtn": lambda: Plan.preset("rtn", bits=4, group_size=32),
    "gptq": lambda: Plan.preset("gptq", bits=3, group_size=32),
    "spqr": lambda: Plan.preset("spqr", bits=3, group_size=16),
    "adadim": lambda: Plan.from_dict(
        {"rules": [{"match": "@blocks", "method": "adadim", "choices": CHOICES}]}
    ),
    "float inputs": lambda: Plan.from_dict(
        {
            "rules": [{"match": "@blocks", "method": "gptq", "bits": 4, "group_size": 32}],
            "float_inputs": True,
        }
    ),
    "W4A8": lambda: Plan.scheme("W4A8", clip="minmax"),
    "budget": lambda: Plan.budget(3.5),
}
SLOW = ("spqr", "float inputs", "W4A8", "budget")


def measured(model: Path, plan: Plan, calibration: Calibration, out: Path, **options: Any) -> int:
    """Most bytes that live on the device while ``model`` is quantized there."""
    meter: Meter
    with OtherDevice(), metered() as meter:
        quantize(model, out, plan, calibration, device=NAME, **options)
    assert meter.peak > 0
    return meter.peak


def check(model: Path, plan: Plan, calibration: Calibration, out: Path, **options: Any) -> None:
    """Check that the plan for ``model`` predicts what the run takes, and little more."""
    size = estimate(prepare(model, plan, calibration, NAME), **options)
    assert size.device_memory is not None
    predicted, taken = (
        size.device_memory - WORKSPACE,
        measured(model, plan, calibration, out, **options),
    )
    assert taken <= predicted <= 1.5 * taken


@pytest.mark.parametrize(
    "name",
    ["rtn", "gptq", "adadim", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
def test_plans_predict_the_memory_of_small_runs(
    name: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    plan = PLANS[name]()
    calibration = Calibration(samples=0) if name == "rtn" else short
    check(tiny("llama"), plan, calibration, tmp_path / "out")


@pytest.mark.slow
def test_plans_predict_the_memory_of_a_block_of_the_demo_model(
    text_file: Path, tmp_path: Path
) -> None:
    model = build(tiny_config("llama", **DEMO), tmp_path / "model")
    plan, calibration = PLANS["gptq"](), Calibration(str(text_file), samples=8, seqlen=256)
    check(model, plan, calibration, tmp_path / "plenty")
    resumed = estimate(prepare(model, plan, calibration, NAME))
    assert resumed.residence.resumes
    assert resumed.device_memory is not None
    bound = 0.95 * resumed.device_memory / 1e9
    check(model, plan, calibration, tmp_path / "bounded", max_vram=bound)


@settings(quick, max_examples=12)
@given(
    name=st.sampled_from(["rtn", "gptq", "spqr", "adadim"]),
    segments=st.sampled_from([(1, 16), (4, 32), (9, 24)]),
    share=st.floats(0.0, 0.999),
    free=st.booleans(),
)
def test_a_refusal_names_a_bound_that_is_then_enough(
    name: str, segments: tuple[int, int], share: float, free: bool, tiny: Tiny, text_file: Path
) -> None:
    """Whether ``--max-vram`` is too little, or what is free on the device."""
    samples, seqlen = segments
    calibration = Calibration(str(text_file), samples=samples, seqlen=seqlen)
    job = prepare(tiny("llama"), PLANS[name](), calibration, NAME)
    smallest = min(device_bytes(job, one) or 0 for one in residences(job))
    bound = share * smallest / 1e9

    def with_free(gigabytes: float) -> Estimate:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(residence, "free_memory", lambda _: 1e9 * gigabytes / DEVICE_SHARE)
            return estimate(job)

    def with_bound(gigabytes: float) -> Estimate:
        return estimate(job, max_vram=gigabytes)

    bounded = with_free if free else with_bound
    with pytest.raises(DeviceMemoryError, match=r"at least \d+\.\d\d GB") as refused:
        bounded(bound)
    named = float(re.findall(r"at least (\S+) GB", str(refused.value))[0])
    size = bounded(named + (1e-8 if free else 0.0))  # whole bytes of a share
    assert size.device_memory is not None
    assert smallest <= size.device_memory <= 1e9 * named <= smallest + 1e7


def test_a_run_keeps_within_the_least_bound(tiny: Tiny, short: Calibration, tmp_path: Path) -> None:
    plan = PLANS["gptq"]()
    with pytest.raises(DeviceMemoryError) as refused:
        estimate(prepare(tiny("llama"), plan, short, NAME), max_vram=0.0)
    named = float(re.findall(r"give (\S+) or more", str(refused.value))[0])
    taken = measured(tiny("llama"), plan, short, tmp_path / "out", max_vram=named)
    assert taken + WORKSPACE <= 1e9 * named


class Notes(Silent):
    """What a run says, in lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_fewer_segments_at_once_are_said_recorded_and_kept(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    model, plan, out, notes = tiny("llama"), PLANS["gptq"](), tmp_path / "out", Notes()
    job = prepare(model, plan, short, NAME)
    *_, smallest = residences(job)
    least = (WORKSPACE + working_set(job, smallest) + 1) / 1e9
    options: dict[str, Any] = {"device": NAME, "progress": notes}
    with OtherDevice():
        result = quantize(model, out, plan, short, max_vram=least, **options)
        (said,) = [line for line in notes.lines if "segments go through a block" in line]
        fewer = result.report["identity"][AT_ONCE]
        assert int(fewer) < 4
        assert said.startswith(f"memory of {job.device}: {fewer} instead of 4 segments")
        notes.lines.clear()
        quantize(model, out, plan, short, resume=True, **options)  # with all memory there is
        assert any("finished already" in line for line in notes.lines)
