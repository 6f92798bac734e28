from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quantine.core.fixed_dtypes import FixedDtypes


class Scaled(FixedDtypes):
    fixed_names = ("codes", "scale", "absent")

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("codes", torch.arange(4, dtype=torch.uint8))
        self.register_buffer("scale", torch.tensor([1.5, 2.5], dtype=torch.float16))
        self.register_buffer("absent", None)
        self.register_buffer("follows", torch.ones(3))


class Full(MemoryError):
    """Stands for a device that has no room left."""


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_a_cast_changes_all_but_the_fixed() -> None:
    module = Scaled().to(torch.bfloat16)
    assert module.get_buffer("scale").dtype == torch.float16
    assert module.get_buffer("codes").dtype == torch.uint8
    assert module.get_buffer("follows").dtype == torch.bfloat16
    assert module.inner.weight.dtype == torch.bfloat16
    assert module.scale.tolist() == [1.5, 2.5]
    assert module._buffers["absent"] is None


@pytest.mark.parametrize("last", range(6))
def test_a_move_that_fails_anywhere_takes_nothing_away(last: int) -> None:
    model = nn.Sequential(Scaled(), Scaled())
    before, calls = state(model), 0

    def move(tensor: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > last:
            raise Full
        return tensor.clone()

    with pytest.raises(Full):
        model._apply(move)
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.to("meta")[1].get_buffer("scale").dtype == torch.float16
