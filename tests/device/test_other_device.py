"""The device that stands for others in tests refuses tensors of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from other_device import NAME, OtherDevice, OtherTensor, StrayTensor, moved
from quantine.kernels import bits


@pytest.mark.parametrize(
    "meet",
    [
        lambda x, stray: x + stray,
        lambda x, stray: x.add_(stray),
        lambda x, stray: stray.add_(x),
        lambda x, stray: x @ stray,
        lambda x, stray: torch.where(x > 0, x, stray),
        lambda x, stray: torch.cat([x, stray]),
        lambda x, stray: x[stray.long().flatten() * 0],
        lambda x, stray: torch.equal(x, stray),
        lambda x, stray: torch.mul(x, x, out=stray),
        lambda x, stray: bits.unpack(x.byte(), 2, 4) + stray.byte(),
    ],
)
def test_a_stray_tensor_of_the_cpu_is_refused(meet: Any) -> None:
    x, stray = moved(torch.ones(4, 4), NAME), torch.ones(4, 4)
    assert meet(x, moved(stray, NAME)) is not None
    with pytest.raises(StrayTensor, match=r"float32|int64|uint8"):
        meet(x, stray)


def test_tensors_of_the_device_are_made_there_share_memory_and_come_back() -> None:
    device = torch.device(NAME)
    with OtherDevice():
        made = [
            torch.zeros(2, device=device),
            torch.arange(3, device=device),
            torch.tensor([1, 2], device=device),
            torch.eye(2, device=device),
            torch.full((2,), 1.5, device=device),
            torch.empty(2, device="cpu").to(device),
        ]
        for tensor in made:
            assert isinstance(tensor, OtherTensor)
            assert tensor.device.type == NAME
            assert tensor.new_ones(1).device.type == NAME
            assert not isinstance(tensor.cpu(), OtherTensor)
        x = torch.zeros(3, 4, device=device)
        x[1:, 2] += 5.0
        x.T[0].copy_(torch.ones(3))
        torch.add(x[0], 1.0, out=x[0])
    assert x.cpu().tolist() == [[2, 1, 1, 1], [1, 0, 5, 0], [1, 0, 5, 0]]
