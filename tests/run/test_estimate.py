"""Predictions of memory: where hidden states go, what is refused, and what the numbers mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantine import Calibration, DeviceMemoryError, Plan, PlanError
from quantine.calibrate.setup import TOKENS_PER_BATCH
from quantine.core.device import CPU, is_here
from quantine.run import peak
from quantine.run.estimate import estimate
from quantine.run.job import Job
from quantine.run.peak import WORKSPACE, process_bytes
from quantine.run.prepare import prepare
from quantine.run.quantize import carry_out
from quantine.run.residence import MARGIN, residences
from quantine.run.working_set import Residence, working_set

Tiny = Callable[[str], Path]

GPU = "cuda"


@pytest.fixture
def job(tiny: Tiny, short: Calibration) -> Job:
    plan = Plan.preset("gptq", bits=4, group_size=32)
    return prepare(tiny("llama"), plan, short, GPU, planned=True)


@pytest.mark.skipif(is_here(torch.device(GPU)), reason="what is free there would count")
def test_a_device_that_is_not_there_can_be_planned_for(job: Job) -> None:
    size = estimate(job)
    assert size.device_limit is None
    assert size.device_memory is not None
    assert size.residence == Residence("device", True, TOKENS_PER_BATCH)
    assert estimate(job, max_vram=24).device_limit == 24_000_000_000


def test_less_memory_moves_hidden_states_and_makes_batches_smaller(job: Job) -> None:
    most = estimate(job, max_vram=10).device_memory
    assert most is not None
    found = []
    for share in range(100, 0, -2):
        try:
            size = estimate(job, max_vram=(WORKSPACE + (most - WORKSPACE) * share / 100) / 1e9)
        except DeviceMemoryError:
            break
        assert size.device_memory is not None
        assert size.device_limit is not None
        assert size.device_memory <= size.device_limit
        found.append(size.residence)
    kinds = list(dict.fromkeys((one.hidden, one.resumes) for one in found))
    assert kinds[0] == ("device", True)
    assert len(kinds) > 1
    sizes = [working_set(job, one) for one in dict.fromkeys(found)]
    assert sizes == sorted(sizes, reverse=True)


def test_the_refusal_names_the_least_memory_that_works(job: Job) -> None:
    with pytest.raises(DeviceMemoryError, match=r"at least \d+\.\d\d GB on cuda") as refused:
        estimate(job, max_vram=0.001)
    least = float(re.findall(r"at least (\S+) GB", str(refused.value))[0])
    assert estimate(job, max_vram=least).device_memory is not None
    with pytest.raises(DeviceMemoryError):
        estimate(job, max_vram=least - 0.01)


def test_a_bound_is_for_devices_with_memory_of_their_own(tiny: Tiny, short: Calibration) -> None:
    plan = Plan.preset("gptq", bits=4, group_size=32)
    job = prepare(tiny("llama"), plan, short)
    with pytest.raises(PlanError, match="the device is cpu"):
        estimate(job, max_vram=8)
    assert estimate(job).device_memory is None


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_bounds_that_are_no_sizes_are_refused(value: float, job: Job) -> None:
    with pytest.raises(PlanError, match="max_vram must not be negative"):
        estimate(job, max_vram=value)


def test_statistics_of_other_batches_are_not_mixed(job: Job) -> None:
    here = replace(job, device=CPU)
    usual, smaller = (here.identity("weights", tokens) for tokens in (TOKENS_PER_BATCH, 32))
    assert smaller == usual | {"segments at once": "1"}


def test_a_run_that_goes_on_keeps_its_batches_whatever_is_free(job: Job) -> None:
    def at_once(**options: float) -> int:
        return job.segments_at_once(estimate(job, **options).residence.batch_tokens)

    usual = at_once(max_vram=10)
    assert usual == job.segments_at_once() > 1
    assert at_once(max_vram=10, at_once=1) == 1
    *_, smallest = residences(job)
    least = (WORKSPACE + working_set(job, smallest) + 1) / 1e9
    assert at_once(max_vram=least) < usual
    with pytest.raises(DeviceMemoryError):
        estimate(job, max_vram=least, at_once=usual)


@pytest.fixture
def on_cpu(tiny: Tiny, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job in a process that has nothing else in memory, with many more tokens than weights."""
    monkeypatch.setattr(peak, "resident_memory", lambda: 1)
    plan = Plan.preset("gptq", bits=4, group_size=32)
    return prepare(tiny("llama"), plan, Calibration(str(text_file), samples=400, seqlen=128))


def least_ram(job: Job) -> float:
    """The smallest bound of memory that works, as the refusal of a smaller one names it."""
    with pytest.raises(PlanError, match=r"takes at least \d+\.\d\d GB of memory") as refused:
        estimate(job, 0)
    assert len(str(refused.value)) < 300
    return float(re.findall(r"give (\S+) or more", str(refused.value))[0])


def test_the_refusal_names_the_least_memory_of_the_process_that_works(on_cpu: Job) -> None:
    least = least_ram(on_cpu)
    assert not estimate(on_cpu, least).residence.resumes
    with pytest.raises(PlanError, match=f"more than max_ram {least - 0.01:g}"):
        estimate(on_cpu, least - 0.01)


def test_what_is_spilled_is_chosen_by_the_memory_of_the_process(on_cpu: Job) -> None:
    least, usual = least_ram(on_cpu), estimate(on_cpu)
    assert usual.residence == Residence("device", True)
    most = MARGIN * process_bytes(on_cpu, usual.residence) + 1
    found = []
    for part in range(41):
        bound = most + (least * 1e9 - most) * part / 40
        residence = estimate(on_cpu, bound / 1e9).residence
        assert MARGIN * process_bytes(on_cpu, residence) <= bound + 1
        found.append(residence)
    assert list(dict.fromkeys((one.hidden, one.resumes) for one in found)) == [
        ("device", True),
        ("device", False),
        ("disk", False),
    ]
    # Bytes of results do not depend on memory.
    assert {one.batch_tokens for one in found} == {TOKENS_PER_BATCH}


def test_a_run_begins_only_within_its_bound(on_cpu: Job, tmp_path: Path) -> None:
    least = least_ram(on_cpu)
    with pytest.raises(PlanError, match="takes at least"):
        carry_out(on_cpu, tmp_path / "out", max_ram=least - 0.01)
    assert not (tmp_path / "out").exists()


def test_a_machine_that_is_too_small_is_no_reason_to_refuse(
    on_cpu: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantine.run.residence.memory_limit", lambda: 1_000)
    assert estimate(on_cpu).residence == Residence("disk", False, reads_ahead=False)
