"""A device that is not the CPU, for tests: ``torch.device("other")``.

Its tensors hold one of the CPU, on which everything is computed, so that results are those of the
CPU to the bit. But they meet only each other, and numbers: a tensor of the CPU among them is
refused, as a GPU would refuse it. Nothing but PyTorch can reach their values before they are moved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

from quantine.kernels import bits
from quantine.kernels.kv_attention import packing

NAME: Final = "other"

CROSSING: Final = frozenset({torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default})
"""What moves values between devices."""


class StrayTensor(RuntimeError):
    """A tensor of the CPU met one of the other device."""


class OtherTensor(Tensor):
    """A tensor of the other device.

    Args:
        inner: the tensor of the CPU that has its values. Views share memory as theirs do.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OtherTensor:
        """Of the shape of ``inner``."""
        made: OtherTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        return made

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def data_ptr(self) -> int:
        """A number that tells memory from other memory."""
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        """Its values, as every device gives them."""
        return self.inner.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """What holds its values."""
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo: Any) -> OtherTensor:
        made = OtherTensor(self.inner.clone())
        if isinstance(self, nn.Parameter):
            return nn.Parameter(made, self.requires_grad)  # type: ignore[return-value]
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OtherTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """``func`` of what the tensors hold."""
        return _computed(func, args, dict(kwargs or {}))


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in _OWN:
        return _OWN[func](*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    stray = [t for t in tensors if not isinstance(t, OtherTensor) and t.ndim > 0]
    others = {id(t.inner): t for t in tensors if isinstance(t, OtherTensor)}
    device = kwargs.get("device")
    if stray and func not in CROSSING and (others or device is None or _is_other(device)):
        found = ", ".join(f"{t.dtype} {list(t.shape)}" for t in stray)
        raise StrayTensor(f"{func} on the other device got a tensor of the CPU: {found}")
    args, kwargs = tree_map_only(OtherTensor, lambda t: t.inner, (args, kwargs))
    if device is not None and _is_other(device):
        kwargs["device"] = torch.device("cpu")
    result = func(*args, **kwargs)
    if device is not None and not _is_other(device):
        return result
    if func is torch.ops.aten.copy_.default and not isinstance(tensors[0], OtherTensor):
        return tensors[0]
    # What was written to in place is returned as the tensor that it was.
    return tree_map_only(
        Tensor, lambda t: others[id(t)] if id(t) in others else OtherTensor(t), result
    )


def _is_other(device: Any) -> bool:
    return torch.device(device).type == NAME


class OtherDevice(TorchFunctionMode):
    """While entered, `torch.tensor` can make tensors of the device; all else always can."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """``func``, by way of the CPU where PyTorch would build a tensor out of numbers."""
        named = dict(kwargs or {})
        device = named.get("device")
        if func in {torch.tensor, torch.as_tensor} and device is not None and _is_other(device):
            return func(*args, **named | {"device": "cpu"}).to(device)
        return func(*args, **named)


class _Module(backend_registration._DummyBackendModule):
    """What ``torch.other`` is."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """What `torch.autocast` may ask for."""
        return [torch.bfloat16, torch.float16]


def _made(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The kernel of every function of PyTorch that reaches the device by its name."""
    return _computed(func, args, kwargs)


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
_LIBRARY: Final = torch.library.Library("_", "IMPL")  # which unregisters when it is collected
_LIBRARY.fallback(_made, "PrivateUse1")
_OWN: Final[dict[Any, Callable[..., Any]]] = {
    bits.unpack._opoverload: bits.unpack._init_fn,
    packing.round_states._opoverload: packing.round_states._init_fn,
}
"""quantine's own functions meet its tensors as they are, and choose kernels by them."""
