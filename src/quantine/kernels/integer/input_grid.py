"""How the inputs of a matrix are rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantine.core.fit_range import fit_activations
from quantine.core.qtensor import QTensor


@dataclass(frozen=True)
class InputGrid:
    """How the inputs of a matrix are rounded.

    Attributes:
        bits: of a code, 2 to 8.
        scale, zero: ``[groups]`` float32, of each group of weights; ``None`` where every token has
            the grid from its least to its largest value.
        reach: ``[1]`` float32, of the factors of tokens; ``None`` where they have none.
    """

    bits: int
    scale: Tensor | None = None
    zero: Tensor | None = None
    reach: Tensor | None = None

    @classmethod
    def of_channels(
        cls,
        bits: int,
        scale: Tensor,
        zero: Tensor,
        qtensor: QTensor,
        reach: Tensor | None = None,
    ) -> InputGrid | None:
        """The grid of channels as the groups of ``qtensor`` meet it.

        Args:
            scale, zero: ``[in]`` float32, in the order of inputs.
            reach: of the factors of tokens, if they have any.

        Returns:
            ``None`` where a group of weights has inputs of several grids.
        """
        if qtensor.in_perm is not None:
            scale, zero = scale[qtensor.in_perm], zero[qtensor.in_perm]
        lengths = list(qtensor.grid.lengths(len(scale)))
        found = []
        for values in (scale, zero):
            groups = values.split(lengths)
            if any(bool((group != group[0]).any()) for group in groups):
                return None
            found.append(torch.stack([group[0] for group in groups]))
        return cls(bits, found[0], found[1], reach)

    def of_inputs(self, x: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each value of ``x``, in its shape."""
        if self.scale is None or self.zero is None:
            low, high = x.aminmax(dim=1, keepdim=True)
            scale, zero = fit_activations(low, high, self.bits)
        else:
            spread = torch.tensor(lengths, device=self.scale.device)
            scale = self.scale.repeat_interleave(spread).unsqueeze(0)
            zero = self.zero.repeat_interleave(spread).unsqueeze(0)
        return scale.expand_as(x), zero.expand_as(x)
