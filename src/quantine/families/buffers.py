"""Buffers that no file holds, such as rotary frequencies, by a model's own initializer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

UNSET: Final = 77
"""What buffers are filled with before the initializer is asked; none is meant to be this all over.
"""


def compute_buffers(model: Any, module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Replace buffers of a module by new ones that the model's initializer computes.

    transformers calls it for every module when it loads a model. Where it leaves one for
    which no file has a place, it is called for the modules around, from the inside to the outside.

    Args:
        model: a model of transformers, whose weights in these modules may be others afterwards.
        module: one of its modules.
        buffers: tensors by the names in the module, which say shapes, dtypes and devices.
    """
    for name, like in buffers.items():
        module._buffers[name] = torch.full_like(like, UNSET)
    for one in (module, *_around(model, module)):
        model._init_weights(one)
        if not _is_unset(module, buffers):
            return


def _is_unset(module: nn.Module, names: Iterable[str]) -> bool:
    """Whether one of a module's buffers is as it was filled, and no file can hold another."""
    computed = module._non_persistent_buffers_set.intersection(names)
    return any(bool((module.get_buffer(name) == UNSET).all()) for name in computed)


def _around(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    """The modules that ``module`` is in, the innermost first."""
    path = next(name for name, one in model.named_modules() if one is module)
    parents = [path.rsplit(".", depth)[0] for depth in range(1, path.count(".") + 1)]
    return [model.get_submodule(parent) for parent in parents]
