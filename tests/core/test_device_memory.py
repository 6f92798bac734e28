"""Memory of devices, by what PyTorch says of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from other_device import NAME
from quantine.core import device_memory
from quantine.core.device import CPU
from quantine.core.device_memory import (
    bounded,
    forget_peak_device_memory,
    free_memory,
    peak_device_memory,
)

CARD = torch.device("cuda", 0)


def test_nothing_is_known_of_the_cpu_and_of_devices_that_do_not_tell() -> None:
    for device in (CPU, torch.device(NAME, 0), torch.device("cuda:99")):
        assert free_memory(device) is None
    for device in (CPU, torch.device(NAME, 0)):
        forget_peak_device_memory(device)
        assert peak_device_memory(device) is None


def test_what_was_taken_and_freed_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "is_here", lambda device: True)
    card = SimpleNamespace(
        mem_get_info=lambda device: (70, 100),
        memory_reserved=lambda device: 20,
        memory_allocated=lambda device: 15,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: card)
    assert free_memory(CARD) == 75


def test_shared_memory_is_free_up_to_what_is_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "is_here", lambda device: True)
    shared = SimpleNamespace(recommended_max_memory=lambda: 60, driver_allocated_memory=lambda: 10)
    monkeypatch.setattr(torch, "get_device_module", lambda device: shared)
    assert free_memory(torch.device("mps")) == 50


def test_a_bound_holds_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [1.0]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80)
    )
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: shares[-1])
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share)
    )
    with pytest.raises(LookupError), bounded(CARD, 20):
        raise LookupError
    with bounded(CARD, None), bounded(CPU, 5):
        pass
    assert shares == [1.0, 0.25, 1.0]
