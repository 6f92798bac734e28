"""Devices by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from other_device import NAME
from quantine.core.device import (
    AUTO,
    CPU,
    described,
    device_facts,
    device_named,
    device_to_plan,
    for_float64,
    is_here,
)
from quantine.errors import BackendUnavailable


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_named(AUTO) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    empty = torch.empty
    asked = []

    def recorded(*sizes: int, device: torch.device, **options: Any) -> torch.Tensor:
        asked.append(device)
        return empty(*sizes, device=CPU, **options)

    monkeypatch.setattr(torch, "empty", recorded)
    device_named(AUTO)
    assert asked == [torch.device("cuda")]


@pytest.mark.parametrize("name", ["cuda:99", "nothing", "meta", "auto:1"])
def test_what_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"cpu"):
        device_named(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:99", "mps", "xpu"])
def test_what_is_not_here_can_be_planned_for(name: str) -> None:
    assert device_to_plan(name) == torch.device(name)


@pytest.mark.parametrize("name", ["nothing", "meta", "cuda:x"])
def test_what_is_no_device_cannot_be_planned_for(name: str) -> None:
    with pytest.raises(BackendUnavailable, match=r"cpu"):
        device_to_plan(name)


def test_devices_are_described_by_their_makers_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_facts(CPU) == {"device": "cpu"}
    assert described(CPU) == "cpu"
    other = torch.device(NAME, 0)
    assert described(other) == str(other)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    card = torch.device("cuda", 1)
    assert described(card) == "cuda:1 (Card 1)"
    assert device_facts(card).keys() == {"device", "CUDA version", "triton version"}


def test_only_what_is_here_is_here() -> None:
    assert is_here(CPU)
    assert not is_here(torch.device("cuda:99"))


def test_float64_is_computed_where_it_can_be() -> None:
    x = torch.ones(2)
    assert for_float64(x) is x
    there = x.to(NAME)
    assert for_float64(there) is there
