"""Modules that replace a model's own, or join them, to reorder channels and round activations."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quantine.activations.centred_keys import CentredKeys
from quantine.activations.stored import check_tensor
from quantine.core.activation_spec import UNQUANTIZED
from quantine.core.permute import is_order
from quantine.errors import FormatError

SITES_NAME: Final = "sites"
"""Name of the child of an attention module that holds its `AttentionSites`."""


class PermutedNorm(nn.Module):
    """A norm that writes its channels in another order; those of the residual stream stay in place.

    Args:
        norm: the model's own norm.
        order: ``[channels]`` int32: place ``j`` of the output gets channel ``order[j]``.
    """

    def __init__(self, norm: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("order", order)

    def check(self, name: str) -> None:
        """Refuse an order, as it was read from files, that is none of the norm's channels.

        Args:
            name: full name of this module, for errors.

        Raises:
            FormatError: names the tensor.
        """
        order = self.get_buffer("order")
        channels = len(self.norm.get_parameter("weight"))
        check_tensor(f"{name}.order", order, torch.int32, (channels,))
        if not is_order(order):
            raise FormatError(f"{name}.order is damaged: it does not name every channel once")

    def forward(self, x: Tensor) -> Tensor:
        """The norm of ``x`` ``[..., channels]``, its channels reordered."""
        ordered: Tensor = self.norm(x).index_select(-1, self.get_buffer("order"))
        return ordered


class GriddedLinear(nn.Linear):
    """A ``Linear`` with float weights whose inputs are rounded first.

    Args:
        of: the layer it replaces, whose weight and bias it shares.
        inputs: the module that rounds inputs ``[..., in]``.
    """

    def __init__(self, of: nn.Linear, inputs: nn.Module) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = of.in_features, of.out_features
        self.weight, self.bias = of.weight, of.bias
        self.inputs = inputs

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Round ``input`` ``[..., in]``, multiply it with the weight and add the bias."""
        return linear(self.inputs(input), self.weight, self.bias)


class GriddedConv1D(nn.Module):
    """GPT-2's ``Conv1D`` with float weights, whose inputs are rounded first.

    Args:
        of: the layer it replaces, whose weight ``[in, out]`` and bias it shares.
        inputs: the module that rounds inputs ``[..., in]``.
    """

    def __init__(self, of: nn.Module, inputs: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = of.get_parameter("weight"), of.get_parameter("bias")
        self.in_features, self.out_features = self.weight.shape
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x`` ``[..., in]``, multiply it with the weight and add the bias."""
        return linear(self.inputs(x), self.weight.T, self.bias)


class AttentionSites(nn.Module):
    """How an attention module rounds its queries, keys, values and probabilities.

    Attributes:
        query, key, value: modules that round ``[batch, tokens, channels]``, the channels of one
            head after another; the identity where nothing is rounded.
        centre: what keys are less by while they are rounded; ``None`` for nothing.
        softmax: bits of probabilities; 16 leaves them as they are.
        relative: how probabilities are rounded, see
            `quantine.kernels.kv_attention.reference.round_probabilities`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query: nn.Module = nn.Identity()
        self.key: nn.Module = nn.Identity()
        self.value: nn.Module = nn.Identity()
        self.centre: CentredKeys | None = None
        self.softmax = UNQUANTIZED
        self.relative = True
