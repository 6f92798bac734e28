"""A model whose activations are rounded, with gradients that pass the rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from quantine.activations.install import rebuild_block, rounding_points
from quantine.core.activation_spec import UNQUANTIZED, ActivationSpec
from quantine.core.straight_through import straight_through
from quantine.families.family import Family
from quantine.families.layers import block_list

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StraightGrid(nn.Module):
    """Rounds activations as ``grid`` does; gradients pass it as if it were not there.

    Args:
        grid: one of `quantine.activations.grids`.
    """

    def __init__(self, grid: nn.Module) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x`` ``[..., channels]``; the result has its shape and dtype."""
        return straight_through(x, self.grid(x.detach()))


def round_activations(
    model: PreTrainedModel,
    family: Family,
    spec: ActivationSpec,
    tensor_of: Callable[[str], Tensor | None],
) -> None:
    """Let the blocks of ``model`` round activations as a run has decided, for tuning.

    Their norms write reordered channels, so their matrices have to be those of the run.

    Args:
        model: computes attention with `quantine.activations.attention`, where its family
            attends; changed in place.
        family: its architecture.
        spec: bits, clusters and ranges of activations.
        tensor_of: see `rebuild_block`.
    """
    for index, block in enumerate(block_list(model, family)):
        own = family.in_block(index)
        rebuild_block(block, f"{family.blocks}.{index}", own, spec, tensor_of)
        for point in rounding_points(own):
            if getattr(spec, point.site) != UNQUANTIZED:
                path, _, leaf = point.grid.rpartition(".")
                parent = block.get_submodule(path)
                setattr(parent, leaf, StraightGrid(getattr(parent, leaf)))
