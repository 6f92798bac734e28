"""A whole model that runs block by block: hidden states, and how the model calls each block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantine.families.base import base_of
from quantine.families.family import Family
from quantine.families.layers import block_list
from quantine.families.stand_in import standing_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BlockStream:
    """Runs segments through a model block by block.

    Args:
        model: the model, with its weights.
        family: its architecture.
        segments: ``[n, tokens]`` int64.
        dtype: dtype in which matrices are multiplied, float32 or bfloat16.

    Attributes:
        hidden: ``[n, tokens, width]`` float32: hidden states that enter the block that comes next,
            at the beginning the first.
    """

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, family: Family, segments: Tensor, dtype: torch.dtype
    ) -> None:
        self._blocks = block_list(model, family)
        _, base = base_of(model, family)
        self._dtype = dtype
        entered = []
        with standing_in(self._blocks, family.outputs) as stand_ins:
            for segment in segments.split(1):
                with self._autocast(segments.device):
                    base(input_ids=segment, use_cache=False, output_attentions=False)
                entered.append(stand_ins[0].entered().float())
        self.hidden = torch.cat(entered)
        # The same for every segment, as all have one length.
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
            (stand_in.args, stand_in.kwargs) for stand_in in stand_ins
        ]

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """The output of block ``index`` for hidden states ``[1, tokens, width]``, float32.

        Only one segment runs at once: a model may call its blocks with a mask for each.
        """
        args, kwargs = self._calls[index]
        with self._autocast(hidden.device):
            output = self._blocks[index](hidden, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple | list) else output
        return result.float()

    @torch.no_grad()
    def outputs(self, index: int) -> Tensor:
        """The outputs of block ``index``, as it is now, for all of `hidden`."""
        return torch.cat([self.run(index, hidden) for hidden in self.hidden.split(1)])

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self._dtype, enabled=self._dtype != torch.float32)
