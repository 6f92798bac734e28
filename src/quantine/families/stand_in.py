"""Stand-ins for decoder blocks: a model then runs without them, and shows how it calls them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class StandIn(nn.Module):
    """Takes the place of a decoder block: records the call, and returns hidden states unchanged.

    Args:
        block: the block, whose attributes the model still finds here.
        outputs: number of values to return, those after the hidden states being ``None``; 0 returns
            hidden states alone. See `quantine.families.family.Family.outputs`.
        replay: hidden states to return instead of those that enter.

    Attributes:
        args, kwargs: the other arguments of the last call.
    """

    def __init__(self, block: nn.Module, outputs: int, replay: Tensor | None = None) -> None:
        super().__init__()
        self._stand_in_for = [block]
        self._replay = [replay]
        self._outputs = outputs
        self._entered: list[Tensor] = []
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stand_in_for"][0], name)

    def entered(self) -> Tensor:
        """The hidden states that entered in the last call, ``[batch, tokens, width]``."""
        return self._entered[0]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """Record the arguments, and return the hidden states or what is replayed instead.

        Hidden states are the block's first argument, by place or by name.
        """
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop(
                next(iter(inspect.signature(self._stand_in_for[0].forward).parameters))
            )
        self._entered, self.args, self.kwargs = [hidden], args, kwargs
        hidden = hidden if self._replay[0] is None else self._replay[0]
        return (hidden, *[None] * (self._outputs - 1)) if self._outputs else hidden


@contextmanager
def standing_in(
    blocks: nn.ModuleList, outputs: int, replay: Tensor | None = None
) -> Iterator[list[StandIn]]:
    """Inside of this context, stand-ins take the places of a model's ``blocks``.

    Args:
        blocks: the model's own list.
        outputs: see `StandIn`.
        replay: see `StandIn`.

    Yields:
        The stand-ins, in the order of the blocks.
    """
    originals = list(blocks)
    stand_ins = [StandIn(block, outputs, replay) for block in originals]
    try:
        for index, stand_in in enumerate(stand_ins):
            blocks[index] = stand_in
        yield stand_ins
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
