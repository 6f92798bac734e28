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
    total: Tensor | None = None

    def record(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal total
        seen = args[0].float().sum(0)
        total = seen if total is None else total.add_(seen)

    def parts() -> Iterator[list[Tensor]]:
        nonlocal total
        for batches in sequential.shards:
            total, count = None, 0
            for batch in batches:
                hidden = sequential.hidden[batch]
                count += len(hidden)
                sequential.run(index, hidden)
            if total is None:
                raise CalibrationError(
                    f"a module of block {index} never ran: family {setup.family.name!r} is "
                    "described wrongly"
                )
            yield [total, total.new_tensor([float(count)])]

    handle = module.register_forward_pre_hook(record)
    try:
        sums, count = setup.ranks.total(parts())
    finally:
        handle.remove()
    return sums / count
