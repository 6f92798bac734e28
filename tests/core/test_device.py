"""Devices by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantine.core.device import AUTO, CPU, device_named
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
