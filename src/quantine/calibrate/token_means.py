"""What enters a module of a block on average at each place of a calibration segment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quantine.calibrate.sequential import Sequential
from quantine.errors import CalibrationError


@torch.no_grad()
def means_by_token(sequential: Sequential, index: int, module: nn.Module) -> Tensor:
    """Means over all segments of what enters a module, place by place.

    Args:
        sequential: the calibration text, as it enters the block.
        index: number of the block.
        module: a module inside the block; its input is ``[segments, tokens, channels]``.

    Returns:
        ``[tokens, channels]`` float32, on every rank.

    Raises:
        CalibrationError: the module never ran.
    """
    setup = sequential.setup
    found: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].detach().double().sum(0))

    def parts() -> Iterator[list[Tensor]]:
        for batches in sequential.own_shards:
            found.clear()
            count = 0
            for batch in batches:
                count += len(sequential.hidden[batch])
                sequential.run(index, sequential.hidden[batch])
            if not found:
                raise CalibrationError(
                    f"a module of block {index} never ran: family {setup.family.name!r} is "
                    "described wrongly"
                )
            total = torch.stack(found).sum(0)
            yield [total, total.new_tensor([float(count)])]

    handle = module.register_forward_pre_hook(record)
    try:
        total, count = setup.ranks.total(parts())
    finally:
        handle.remove()
    return (total / count).float()
