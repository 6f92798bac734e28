"""Models without weights, and giving parts of them weights for a while."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantine.families.buffers import compute_buffers
from quantine.families.experts import separate
from quantine.source.settings import attention_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def skeleton(config: PretrainedConfig, attention: str | None = None) -> PreTrainedModel:
    """Build the causal language model of ``config`` without memory for weights.

    Parameters are float32 on the meta device; the model is in evaluation mode. Each expert is a
    module of its own.

    Args:
        config: the model's configuration in transformers, which is not changed.
        attention: name of an attention function that transformers knows; ``None`` takes the
            one that the model needs, or else lets it choose.
    """
    from transformers import AutoModelForCausalLM

    own = copy.deepcopy(config)  # which the model marks with its dtype
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            own,
            dtype=torch.float32,
            attn_implementation=attention or attention_of(config),
            trust_remote_code=False,
        )
    separate(model)
    model.eval()
    return model


def make_buffers(model: PreTrainedModel, module: nn.Module, device: torch.device) -> None:
    """Compute the buffers of a part of a model that have no values yet, on ``device``."""
    for child in module.modules():
        missing = {n: b for n, b in child._buffers.items() if b is not None and b.is_meta}
        if missing:
            empty = {n: torch.empty_like(b, device=device) for n, b in missing.items()}
            compute_buffers(model, child, empty)


def weight_names(module: nn.Module, path: str, skip: str = "-") -> list[str]:
    """Full names of the tensors of a part of a model that files hold.

    Args:
        module: the part of the model.
        path: path of ``module`` in the model; empty for the model itself.
        skip: prefix of the names that are left out; no name has the default.
    """
    return [
        name
        for name in module.state_dict(prefix=f"{path}." if path else "")
        if not name.startswith(skip)
    ]


def fill(model: PreTrainedModel, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Give a model the weights ``tensors``, as float32.

    Args:
        model: the model.
        tensors: by full name, in the dtypes in which files store them. They are taken out one after
            another, so that little is in memory twice.
        device: device that the weights are put on.
    """
    for name in list(tensors):
        stored = tensors.pop(name)
        if stored.dtype == torch.float64:
            stored = stored.float()  # not every device has float64
        # What leaves page-locked memory need not be waited for.
        value = stored.to(device, non_blocking=device.type == "cuda")
        set_tensor(model, name, value.float() if value.is_floating_point() else value)


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
