"""Modules that stand where a model's own ones were, once channels are reordered and rounded."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn
from torch.nn.functional import linear

from quantine.core.activation_spec import UNQUANTIZED

SITES_NAME: Final = "sites"
"""Name of the `AttentionSites` in a module of attention."""


class PermutedNorm(nn.Module):
    """A norm that writes its channels in another order; the residual stream keeps its own.

    Args:
        norm: the norm.
        order: ``[channels]`` int32: place ``j`` gets channel ``order[j]``.
    """

    def __init__(self, norm: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        """Norm of ``x`` ``[..., channels]``, reordered."""
        ordered: Tensor = self.norm(x).index_select(-1, self.get_buffer("order"))
        return ordered


class GriddedLinear(nn.Linear):
    """A float ``Linear`` that rounds its inputs first.

    Args:
        of: the layer whose weight and bias are used.
        inputs: what rounds ``[..., in]``.
    """

    def __init__(self, of: nn.Linear, inputs: nn.Module) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = of.in_features, of.out_features
        self.weight, self.bias = of.weight, of.bias
        self.inputs = inputs

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Round and multiply."""
        return linear(self.inputs(input), self.weight, self.bias)


class AttentionSites(nn.Module):
    """What attention does to queries, keys, values ``[batch, tokens, channels]`` and softmax.

    Attributes:
        query, key, value: modules that round; the identity where nothing is.
        softmax: bits of probabilities; 16 for none.
        relative: see `quantine.kernels.kv_attention.round_probabilities`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query: nn.Module = nn.Identity()
        self.key: nn.Module = nn.Identity()
        self.value: nn.Module = nn.Identity()
        self.softmax = UNQUANTIZED
        self.relative = True
