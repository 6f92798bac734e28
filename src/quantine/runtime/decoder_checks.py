"""Checks that a model is one whose computation the native decoder knows.

The native decoder follows the classes of transformers, not what was built or put on top of them.
So every module must be exactly of the class that belongs in its place, with nothing of its own, and
the classes must be as transformers defines them. Anything else is refused, with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from quantine.activations.attention import NAME as ROUNDING
from quantine.activations.attention import attention as rounding_attention
from quantine.core.overrides import own_methods
from quantine.errors import BackendUnavailable
from quantine.runtime.definitions import KNOWN_ATTENTION, LIBRARIES, Definitions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OURS: Final = frozenset(
    {
        "generate",
        "resize_token_embeddings",
        "save_pretrained",
        "set_attn_implementation",
        "tie_weights",
    }
)
"""Methods that quantine replaces in a model that it loads; they change nothing of what it computes.
"""
CACHED: Final = frozenset({"long_inv_freq"})
"""Tensors that transformers keeps beside a module's own; the native decoder goes without them: see
`quantine.runtime.decoder_positions.LONG_ROPE`."""
PLAIN_TENSORS: Final = frozenset({Tensor, nn.Parameter})
"""Types of tensors that compute as PyTorch defines it."""
HEADS: Final = ("ForCausalLM", "LMHeadModel")
"""What the names of classes that generate text end with in transformers."""


@dataclass(frozen=True)
class Classes:
    """The classes that transformers defines for one model type.

    Attributes:
        home: the module of transformers that defines them.
        prefix: what their names begin with, such as ``Llama``.
    """

    home: ModuleType
    prefix: str

    def named(self, *endings: str) -> type[nn.Module]:
        """The class whose name has the first of ``endings`` for which there is one.

        Raises:
            BackendUnavailable: there is none.
        """
        for ending in endings:
            found = getattr(self.home, f"{self.prefix}{ending}", None)
            if isinstance(found, type):
                return found
        return refuse(f"{self.home.__name__} has no class {self.prefix}{endings[0]}")


def classes_of(model: PreTrainedModel) -> Classes:
    """The classes that the modules of ``model`` must have.

    Raises:
        BackendUnavailable: it is no language model that transformers itself defines.
    """
    kind, config = type(model), type(model.config)
    home = kind.__module__
    package = config.__module__.rpartition(".")[0]
    ending = next(filter(kind.__name__.endswith, HEADS), None)
    if (
        not package.startswith("transformers.models.")
        or home.rpartition(".")[0] != package
        or ending is None
    ):
        refuse(f"the model is a {kind.__name__} of {home}")
    return Classes(sys.modules[home], kind.__name__.removesuffix(ending))


def check_model(model: PreTrainedModel) -> None:
    """Check that nothing was put onto ``model``, of whatever family, or onto what it consists of.

    Raises:
        BackendUnavailable: it is in training mode or not on the CPU, or only in part; it has hooks,
            methods or tensors of another kind; a class or function that it uses was replaced; or it
            has another attention function than ``eager``, ``sdpa`` or quantine's.
    """
    if hasattr(model, "hf_device_map"):
        refuse("accelerate has spread the modules of the model over several places")
    for name, module in model.named_modules():
        _check_module(name or "the model", module, OURS if module is model else frozenset())
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention = model.config._attn_implementation
    if attention not in KNOWN_ATTENTION:
        refuse(f"attention is {attention!r}")
    if attention == ROUNDING and ALL_ATTENTION_FUNCTIONS[ROUNDING] is not rounding_attention:
        refuse(f"the attention function {ROUNDING!r} was replaced")
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        refuse("PyTorch has hooks for all modules")
    patched = Definitions(model).patched()
    if patched is not None:
        refuse(f"{patched} was replaced")


def _check_module(name: str, module: nn.Module, known: frozenset[str]) -> None:
    kind = type(module)
    if kind.__module__.partition(".")[0] not in LIBRARIES:
        refuse(f"{name} is a {kind.__name__} of {kind.__module__}")
    if module.training and any(module.children()):  # single layers compute the same in it
        refuse(f"{name} is in training mode")
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if not all(map(_only_captures, hooks)):
        refuse(f"{name} has hooks")
    own = set(own_methods(module)) - known
    if own:
        refuse(f"{name} has a method of its own, {min(own)}")
    if {key for key, value in vars(module).items() if isinstance(value, Tensor)} - CACHED:
        refuse(f"{name} has a tensor that is no parameter")
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            _check_tensor(name, tensor)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        refuse(f"the model is not on the CPU, but on {tensor.device}")
    if type(tensor) not in PLAIN_TENSORS:
        refuse(f"{name} has a tensor of type {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        refuse(f"{name} has a tensor of layout {tensor.layout}")


def _only_captures(hook: Callable[..., Any]) -> bool:
    """Whether ``hook`` is one with which transformers collects hidden states when asked for them.

    transformers installs them at the first such call, and they stay.
    """
    from transformers.utils import output_capturing

    install = getattr(output_capturing, "install_output_capuring_hook", None)
    constants = () if install is None else install.__code__.co_consts
    known = [part for part in constants if isinstance(part, CodeType)]
    return any(getattr(hook, "__code__", None) is part for part in known)


def expect(
    module: nn.Module,
    kind: type[nn.Module],
    what: str,
    needed: Iterable[str],
) -> None:
    """Check that ``module`` is exactly a ``kind`` and has exactly the children ``needed``.

    Args:
        what: how an error calls the module.

    Raises:
        BackendUnavailable: it is something else.
    """
    if type(module) is not kind:
        refuse(f"{what} is a {type(module).__name__}")
    odd = {name for name, _ in module.named_children()} ^ {*needed}
    if odd:
        refuse(f"{what} ({kind.__name__}) differs in {', '.join(sorted(odd))}")


def dropouts(module: nn.Module, names: Iterable[str]) -> set[str]:
    """Those of ``names`` that are children of ``module``, which do nothing.

    Raises:
        BackendUnavailable: one is no dropout, or drops something.
    """
    found = {name for name in names if name in module._modules}
    for name in found:
        child = module.get_submodule(name)
        expect(child, nn.Dropout, f"the dropout {name}", ())
        if child.training:
            refuse(f"{name} is in training mode")
    return found


def refuse(reason: str) -> NoReturn:
    """Raise the error that says why there is no native decoder.

    Raises:
        BackendUnavailable: always.
    """
    raise BackendUnavailable(f"no native decoder: {reason}")
