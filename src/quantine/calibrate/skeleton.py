"""Models without weights, and giving parts of them weights for a while."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from quantine.source.checkpoint import Checkpoint


def skeleton(config: PretrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """Build the causal language model of ``config`` without memory for weights.

    Parameters are float32 on the meta device; the model is in evaluation mode.

    Args:
        config: the model's configuration in transformers, which is not changed.
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


def materialize(
    model: PreTrainedModel,
    module: nn.Module,
    path: str,
    checkpoint: Checkpoint,
    device: torch.device | str = "cpu",
    skip: str = "-",
) -> None:
    """Read the weights of a part of a model, as float32, and compute its buffers.

    Args:
        model: the model.
        module: the part of it that gets weights.
        path: path of ``module`` in ``model``.
        checkpoint: the files that weights are read from.
        device: device that the tensors are put on.
        skip: prefix of the full names that are left without weights; no name has the default.
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
    """Replace a parameter or buffer of ``model`` by ``value``.

    Args:
        model: the model.
        name: full name of the parameter or buffer.
        value: the new tensor, which is not copied; its shape and device may differ from the old.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def drop_weights(module: nn.Module) -> None:
    """Move all parameters of ``module`` to the meta device, which frees their memory."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
