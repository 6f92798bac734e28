"""Whole runs of `quantize` on a device that refuses tensors of the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from little_memory import little_memory
from other_device import (
    NAME,
    OtherDevice,
    OtherTensor,
    no_extension,
    untouched_extension,
    without_float64,
)
from quantine import Calibration, Plan, quantize
from quantine.core.device import has_float64
from quantine.run.estimate import estimate
from quantine.run.peak import WORKSPACE
from quantine.run.prepare import prepare
from quantine.run.progress import Silent
from quantine.run.working_set import Residence, working_set
from tiny_models import FAMILIES, build, stored_tensors, tiny_config

Tiny = Callable[[str], Path]

NARROW = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
"""Every number of a column is a call of Python on this device."""

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
    "gptq": lambda: Plan.preset("gptq", bits=3, group_size=16),
    "spqr": lambda: Plan.preset("spqr", bits=3, group_size=16),
    "adadim": lambda: Plan.from_dict(BOTH_AXES),
    "W4A4KV": lambda: Plan.scheme("W4A4KV"),
    "rounded W4A4KV": lambda: Plan.scheme("W4A4KV", method="rtn"),
    "budget": lambda: Plan.budget(3.5).with_head(8),
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A llama of so many blocks, half as wide as the other tiny ones."""
    root = tmp_path_factory.mktemp("narrow")

    def model(blocks: int) -> Path:
        path = root / str(blocks)
        if not path.exists():
            build(tiny_config("llama", **NARROW, num_hidden_layers=blocks), path)
        return path

    return model


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama", "rtn"),
        ("narrow", "spqr"),
        ("narrow", "adadim"),
        ("narrow", "W4A4KV"),
        ("narrow", "budget"),
        ("opt", "gptq"),
    ],
)
def test_a_run_there_writes_what_references_write_here(
    model: str,
    name: str,
    tiny: Tiny,
    narrow: Callable[[int], Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    source = tiny(model) if model in FAMILIES else narrow(1)
    plan, short = PLANS[name](), Calibration(str(text_file), samples=2, seqlen=16)
    # The CPU has attention of its own, which rounds otherwise.
    with no_extension(), sdpa_kernel(SDPBackend.MATH):
        quantize(source, tmp_path / "here", plan, short)
    with OtherDevice(), untouched_extension(), without_float64():
        quantize(source, tmp_path / "there", plan, short, device=NAME)
    here, there = stored_tensors(tmp_path / "here"), stored_tensors(tmp_path / "there")
    assert list(here) == list(there)
    for tensor_name, tensor in here.items():
        assert torch.equal(there[tensor_name], tensor), tensor_name
    assert layers_of(tmp_path / "there") == layers_of(tmp_path / "here")


def layers_of(out: Path) -> list[dict[str, Any]]:
    """What the report says of each layer, but for times."""
    layers = json.loads((out / "quantine_report.json").read_text())["layers"]
    return [{key: value for key, value in layer.items() if key != "seconds"} for layer in layers]


@pytest.mark.parametrize("name", ["gptq", "rounded W4A4KV"])
def test_a_run_there_can_be_resumed(
    name: str, narrow: Callable[[int], Path], text_file: Path, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def stop(*_: Any) -> Any:
        raise Stopped

    plan, short = PLANS[name](), Calibration(str(text_file), samples=2, seqlen=16)
    with OtherDevice(), untouched_extension():
        quantize(narrow(2), tmp_path / "whole", plan, short, device=NAME)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Silent, "block", stop)
            with pytest.raises(Stopped):
                quantize(narrow(2), tmp_path / "cut", plan, short, device=NAME)
        quantize(narrow(2), tmp_path / "cut", plan, short, device=NAME, resume=True)
    whole, cut = stored_tensors(tmp_path / "whole"), stored_tensors(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("device", ["cpu", NAME])
def test_two_runs_write_the_same_bytes(
    device: str, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    with OtherDevice():
        first, second = (
            quantize(tiny("llama"), tmp_path / name, PLANS["gptq"](), short, device=device).path
            for name in ("first", "second")
        )
    files = sorted(first.glob("*.safetensors"))
    assert files
    assert all(file.read_bytes() == (second / file.name).read_bytes() for file in files)
    report = json.loads((first / "quantine_report.json").read_text())
    assert report["device"]["device"].partition(":")[0] == device
    assert report["identity"].get("device") == (
        None if device == "cpu" else report["device"]["device"]
    )


def test_where_hidden_states_are_does_not_matter(
    tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    """With little memory on the device they are in that of the CPU, or on disk."""
    plan = PLANS["gptq"]()
    job = prepare(tiny("llama"), plan, short, NAME)
    least = (working_set(job, Residence("disk", False)) + WORKSPACE) / 1e9
    assert estimate(job, max_vram=least).residence == Residence("memory", False)
    with little_memory():
        assert estimate(job, max_vram=least).residence == Residence("disk", False)
    with OtherDevice():
        plenty = quantize(tiny("llama"), tmp_path / "plenty", plan, short, device=NAME).path
        for little in (False, True):
            out = tmp_path / str(little)
            with little_memory(little):
                quantize(tiny("llama"), out, plan, short, max_vram=least, device=NAME)
            here, there = stored_tensors(plenty), stored_tensors(out)
            assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize("name", ["adadim", "rounded W4A4KV"])
def test_a_device_without_float64_gives_what_others_give(
    name: str,
    narrow: Callable[[int], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Apple's GPUs: whatever needs float64 is computed on the CPU."""
    plan, short = PLANS[name](), Calibration(str(text_file), samples=2, seqlen=16)
    with OtherDevice():
        quantize(narrow(1), tmp_path / "with", plan, short, device=NAME)
        plain = OtherTensor.__new__

        def refusing(cls: type[OtherTensor], inner: torch.Tensor) -> OtherTensor:
            if inner.dtype == torch.float64:
                raise TypeError("the device has no float64")
            return plain(cls, inner)

        monkeypatch.setattr(OtherTensor, "__new__", staticmethod(refusing))
        has_float64.cache_clear()
        try:
            quantize(narrow(1), tmp_path / "without", plan, short, device=NAME)
        finally:
            has_float64.cache_clear()
    one, other = stored_tensors(tmp_path / "with"), stored_tensors(tmp_path / "without")
    assert all(torch.equal(one[tensor], other[tensor]) for tensor in one)
    assert layers_of(tmp_path / "with") == layers_of(tmp_path / "without")
