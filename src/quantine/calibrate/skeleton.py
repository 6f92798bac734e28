"""A model without weights, and giving parts of it weights for a while."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from quantine.source.checkpoint import Checkpoint


def skeleton(config: PretrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """The causal language model of ``config`` without weights: parameters on the meta device.

    Args:
        attention: name of an attention function that transformers knows; ``None`` lets it choose.
    """
    from transformers import AutoModelForCausalLM

    own = copy.deepcopy(config)  # which the model marks with its dtype
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            own, dtype=torch.float32, attn_implementation=attention
        )
    model.eval()
    return model


class StandIn(nn.Module):
    """Stands in for a block: remembers the call, and passes the hidden states through.

    Args:
        block: whose attributes the model may look at.
        returns_tuple: whether the block returns a tuple.
        replay: what to return instead of the hidden states that come in.
    """

    def __init__(self, block: nn.Module, returns_tuple: bool, replay: Tensor | None = None) -> None:
        super().__init__()
        self._stand_in_for = [block]
        self._replay = [replay]
        self._returns_tuple = returns_tuple
        self._entered: list[Tensor] = []
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stand_in_for"][0], name)

    def entered(self) -> Tensor:
        """The hidden states of the last call."""
        return self._entered[0]

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        """Remember and pass on."""
        self._entered, self.args, self.kwargs = [hidden], args, kwargs
        hidden = hidden if self._replay[0] is None else self._replay[0]
        return (hidden,) if self._returns_tuple else hidden


def materialize(
    model: PreTrainedModel,
    module: nn.Module,
    path: str,
    checkpoint: Checkpoint,
    device: torch.device | str = "cpu",
    skip: str = "-",
) -> None:
    """Give ``module`` of ``model`` buffers and float32 weights.

    Args:
        path: of ``module`` in ``model``.
        checkpoint: where weights come from.
        device: where they go.
        skip: prefix of the names that get none.
    """
    for child in module.modules():
        missing = [name for name, b in child._buffers.items() if b is not None and b.is_meta]
        for name in missing:
            child._buffers[name] = torch.empty_like(child.get_buffer(name), device=device)
        if missing:
            # Buffers that no checkpoint holds (rotary frequencies, embedding scales) are computed
            # by the architecture's own initializer, as transformers does when it loads a model.
            model._init_weights(child)
    names = [name for name in module.state_dict(prefix=f"{path}.") if not name.startswith(skip)]
    for name, tensor in checkpoint.read(names).items():
        value = tensor.float() if tensor.is_floating_point() else tensor
        set_tensor(model, name, value.to(device))


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Give the parameter or buffer ``name`` of ``model`` a value."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def drop_weights(module: nn.Module) -> None:
    """Give the memory of all parameters below ``module`` back."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
