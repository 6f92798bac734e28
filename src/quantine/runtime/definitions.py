"""Whether classes and functions of libraries are still what the libraries define.

Patches for speed and for experiments assign to classes and modules of other libraries
(``LlamaRMSNorm.forward = mine``), or replace functions that these use. A function of the library
itself is told by the file and the name that its code was compiled with.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional
from torch import nn

from quantine.activations import attention as rounding
from quantine.activations.attention import NAME as ROUNDING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KNOWN_ATTENTION: Final = ("eager", "sdpa", ROUNDING)
"""Names of attention functions that the native decoder computes."""

COMPUTING: Final = frozenset(
    {"forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__"}
)
"""Methods that decide on what a module computes when it is called."""

FUNCTIONAL: Final = (
    "dropout",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "relu",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
)
"""Functions of ``torch.nn.functional`` that models with a native decoder call."""

CACHES: Final = ("DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer")
"""Classes of the KV cache that these models use, in ``transformers.cache_utils``."""

LIBRARIES: Final = frozenset({"kernels", "quantine", "torch", "transformers"})
"""Packages whose classes and functions count as originals. transformers itself decorates classes
and functions by ``kernels`` where that is installed; what it then replaces in a model is seen
there."""
COMPILED: Final = ("__compiled_fn", "__resume_at", "__import_", "__builtins_dict__")
"""What the names begin with that ``torch.compile`` adds to the modules of functions it compiles."""


class Definitions:
    """The classes of a model's modules, and the functions they use, as they are at the moment.

    Args:
        model: a model of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers import cache_utils

        kinds = {type(module) for module in model.modules()}
        kinds |= {getattr(cache_utils, name) for name in CACHES}
        self._classes = {base for kind in kinds for base in kind.__mro__ if base is not object}
        self._modules = _modules_of(model)
        self._seen = self._found()

    def _found(self) -> list[Any]:
        owners = [*self._classes, *self._modules]
        return [
            *(
                value
                for owner in owners
                for name, value in tuple(vars(owner).items())
                if not name.startswith(COMPILED)
            ),
            *(getattr(torch.nn.functional, name) for name in FUNCTIONAL),
            *(value for table in _tables(self._modules) for value in table.values()),
        ]

    def hold(self) -> bool:
        """Whether nothing was assigned to these classes and modules since."""
        found = self._found()
        return len(found) == len(self._seen) and all(map(operator.is_, found, self._seen))

    def patched(self) -> str | None:
        """Full name of a function or class that is not its library's own; ``None`` if all are."""
        for kind in self._classes:
            name = patched_method(kind)
            if name is not None:
                return f"{kind.__module__}.{kind.__qualname__}.{name}"
        for module in self._modules:
            for name, value in vars(module).items():
                if not name.startswith(COMPILED) and not _is_own(value, name):
                    return f"{module.__name__}.{name}"
        for name in FUNCTIONAL:
            value = getattr(torch.nn.functional, name)
            if not callable(value) or not _is_own(value, name):
                return f"torch.nn.functional.{name}"
        for table in _tables(self._modules):
            for name, value in table.items():
                if not _is_own(value, None):
                    return f"the attention function or mask {name!r}"
        return None


def _modules_of(model: PreTrainedModel) -> tuple[ModuleType, ...]:
    from transformers import masking_utils, modeling_rope_utils
    from transformers.integrations import sdpa_attention

    return (
        sys.modules[type(model).__module__],
        masking_utils,
        modeling_rope_utils,
        sdpa_attention,
        rounding,
    )


def _tables(modules: Iterable[ModuleType]) -> list[dict[str, Any]]:
    """The registered attention functions and masks that the native decoder knows."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    used = (getattr(module, "ALL_ATTENTION_FUNCTIONS", None) for module in modules)
    tables = [ALL_MASK_ATTENTION_FUNCTIONS, ALL_ATTENTION_FUNCTIONS, *filter(None, used)]
    return [
        {name: table[name] for name in KNOWN_ATTENTION if name in table.valid_keys()}
        for table in tables
    ]


def patched_method(kind: type) -> str | None:
    """Name of a method of ``kind`` that is not its library's own; ``None`` if all are."""
    for name, value in vars(kind).items():
        method = getattr(value, "__func__", value)  # of a static or a class method
        if isinstance(method, FunctionType):
            if not _is_own(method, None):
                return name
            wanted = f"{kind.__qualname__}.{name}"
            if name == "forward" and kind is not nn.Module and not _is_named(method, wanted):
                return name
        elif name in COMPUTING:
            return name
    return None


def _is_own(value: Any, name: str | None) -> bool:
    """Whether ``value`` is no class or callable, or one of `LIBRARIES` or of Python itself.

    Args:
        name: the name that a function of `LIBRARIES` must have been defined with; ``None`` for any.
    """
    if isinstance(value, functools._lru_cache_wrapper):
        value = value.__wrapped__
    if isinstance(value, FunctionType):
        layers = _layers(value)
        if not all(_is_library(layer.__code__.co_filename) for layer in layers):
            return False
        inner = layers[-1].__code__
        return name is None or inner.co_name == name or _is_standard(inner.co_filename)
    if isinstance(value, BuiltinFunctionType) or not callable(value):
        return True
    source = value if isinstance(value, type) else type(value)
    package = source.__module__.partition(".")[0]
    if isinstance(value, type):
        return package in LIBRARIES or package in sys.stdlib_module_names
    return package in {"kernels", "typing"}


def _layers(function: FunctionType) -> list[FunctionType]:
    """A function, what it wraps, what that wraps, and so on."""
    layers = [function]
    while isinstance(inner := getattr(layers[-1], "__wrapped__", None), FunctionType):
        layers.append(inner)
    return layers


def _is_named(function: FunctionType, name: str) -> bool:
    return _layers(function)[-1].__code__.co_qualname == name


@functools.cache
def _is_library(file: str) -> bool:
    loaded = (sys.modules[name] for name in LIBRARIES if name in sys.modules)
    folders = (Path(str(module.__file__)).parent for module in loaded)
    return _is_standard(file) or file.startswith(tuple(f"{folder}{os.sep}" for folder in folders))


@functools.cache
def _is_standard(file: str) -> bool:
    return Path(file).parent == Path(contextlib.__file__).parent
