"""Everything that a native decoder was made from, to notice that any of it has changed.

It is looked at for every call of ``generate``, so this has to be cheap: a few milliseconds for a
model of 30 blocks.
"""

from __future__ import annotations

import operator
import os
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from quantine.runtime.definitions import Definitions
from quantine.runtime.packed import Packed
from quantine.runtime.snapshot import Snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTAINERS: Final = (dict, list, set)
"""Types of attributes whose contents may change while they stay the same object."""
EVERYWHERE: Final = frozenset(vars(nn.Module()))
"""Attributes that every module has; those that count are looked at one by one."""
PLAIN: Final = frozenset({bool, int, float, str, type(None)})
"""Types of values that are compared as such."""
SMALL: Final = 2**16
"""Bytes up to which all of a float tensor is compared, such as norms and biases."""
SAMPLED: Final = 512
"""Number of values, spread evenly, that are compared of a larger float tensor."""


class ModelState:
    """What a native decoder reads of a model, as it is at the moment. It keeps no weights alive.

    These are the modules with their classes, hooks and attributes, the model's configuration, the
    classes and functions they are made of, all tensors, and the process and its threads.

    Writing to a large float tensor through ``tensor.data``, which PyTorch does not record, is
    noticed only where it touches one of `SAMPLED` values.

    Args:
        model: a model of transformers, from which a decoder was made just now.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        modules = list(_tree(model))
        self._objects = _objects(modules)
        self._containers = [(found, _frozen(found)) for found in _containers(modules)]
        self._config = _frozen(vars(model.config))
        self._values = _values(modules)
        self._tensors = Snapshot(_tensors(modules))
        self._definitions = Definitions(model)

    def holds(self, model: PreTrainedModel) -> bool:
        """Whether ``model`` is still the same in everything that a native decoder reads."""
        modules = list(_tree(model))
        objects = _objects(modules)
        return (
            len(objects) == len(self._objects)
            and all(map(operator.is_, objects, self._objects))
            and all(_frozen(found) == before for found, before in self._containers)
            and _frozen(vars(model.config)) == self._config
            and self._tensors.holds(_tensors(modules))
            and _values(modules) == self._values
            and self._definitions.hold()
        )


def _tree(model: nn.Module) -> Iterator[nn.Module]:
    """Every module once, in an order that the structure decides."""
    seen, waiting = set(), [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            waiting += (child for child in module._modules.values() if child is not None)


def _objects(modules: list[nn.Module]) -> list[Any]:
    """All attributes of all modules, and all hooks: any other object is a change."""
    found: list[Any] = []
    found += torch_modules._global_forward_hooks.values()
    found += torch_modules._global_forward_pre_hooks.values()
    for module in modules:
        attributes = module.__dict__
        found.append(type(module))
        found += attributes
        found += attributes.values()
        found += module._modules
        found += module._forward_hooks.values()
        found += module._forward_pre_hooks.values()
    return found


def _containers(modules: list[nn.Module]) -> Iterator[Any]:
    for module in modules:
        for name, value in vars(module).items():
            if name not in EVERYWHERE and isinstance(value, CONTAINERS):
                yield value


def _frozen(value: Any) -> Any:
    """A copy of ``value`` that is equal to a later copy if nothing has changed in between.

    Objects that are no containers are compared by what they are, not by what they hold.
    """
    if isinstance(value, dict):
        return [(key, _frozen(part)) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [_frozen(part) for part in value]
    if isinstance(value, set):
        return set(value)
    return value if type(value) in PLAIN else (id(value), value)


def _tensors(modules: list[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            yield from (tensor for tensor in tensors.values() if tensor is not None)


def _values(modules: list[nn.Module]) -> list[Any]:
    """What is compared by its value: places of modules, names of tensors, contents of floats."""
    found: list[Any] = [os.getpid(), torch.get_num_threads()]
    for module in modules:
        found.append(id(module))
        found += (*module._parameters, *module._buffers)
        found += map(_content, module._parameters.values())
        if not isinstance(module, Packed):  # whose matrix is shared, not copied
            found += map(_content, module._buffers.values())
    return found


def _content(tensor: Tensor | None) -> int | None:
    """A checksum of some or all values of a tensor; ``None`` where there are none on the CPU."""
    if tensor is None or tensor.device.type != "cpu" or not tensor.numel():
        return None
    values = tensor.detach().reshape(-1)
    if tensor.nbytes > SMALL:
        values = values[:: tensor.numel() // SAMPLED | 1].contiguous()
    return zlib.crc32(values.view(torch.uint8).numpy().data)
