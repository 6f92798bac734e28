"""The grid to which the inputs of a matrix are rounded before an integer product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantine.core.fit_range import fit_activations
from quantine.core.qtensor import QTensor


@dataclass(frozen=True)
class InputGrid:
    """The grid to which the inputs of a matrix are rounded.

    Attributes:
        bits: number of bits of one code, 2 to 8.
        scale, zero: ``[groups]`` float32, scale and zero point of the inputs that each group of
            weights meets; ``None`` where every token has a grid of its own, from its smallest to
            its largest value.
        reach: ``[1]`` float32: each token is first divided by a factor, which this sets, see
            `quantine.kernels.integer.token_factors.steepness`; ``None`` for no factors.
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
        """Turn scales and zero points of channels into those of the groups of ``qtensor``.

        Args:
            bits: number of bits of one code, 2 to 8.
            scale, zero: ``[in]`` float32, in the order of the model's inputs.
            qtensor: the packed weight, with groups along inputs.
            reach: the attribute of this name.

        Returns:
            The grid; ``None`` where the inputs of one group of weights differ in scale or zero
            point, so that integers cannot be summed over the group.
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
        """Scale and zero point for every value of ``x``, two tensors float32 of its shape.

        Args:
            x: ``[batch, in]`` float32, in the order in which the matrix stores its columns.
            lengths: number of inputs of each group of weights.
        """
        if self.scale is None or self.zero is None:
            low, high = x.aminmax(dim=1, keepdim=True)
            scale, zero = fit_activations(low, high, self.bits)
        else:
            spread = torch.tensor(lengths, dtype=torch.int64, device=self.scale.device)
            scale = self.scale.repeat_interleave(spread).unsqueeze(0)
            zero = self.zero.repeat_interleave(spread).unsqueeze(0)
        return scale.expand_as(x), zero.expand_as(x)
