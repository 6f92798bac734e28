"""A device that is not the CPU, for tests: ``torch.device("other")``.

Its tensors hold one of the CPU, on which everything is computed, so that results are those of the
CPU to the bit. But they meet only each other, and numbers: a tensor of the CPU among them is
refused, as a GPU would refuse it. Nothing but PyTorch can reach their values before they are moved.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NoReturn

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration

from quantine.core import device as device_module
from quantine.kernels import backend, bits
from quantine.kernels.kv_attention import packing

NAME: Final = "other"

_FILLING: Final = (
    torch.ops.aten.arange.default,
    torch.ops.aten.arange.start,
    torch.ops.aten.arange.start_step,
    torch.ops.aten.eye.default,
    torch.ops.aten.eye.m,
    torch.ops.aten.linspace.default,
    torch.ops.aten.randperm.default,
)
"""Of these, PyTorch itself would make an empty tensor first, and let another function resize it."""
CROSSING: Final = frozenset({torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default})
"""What moves values between devices."""
_FROM_NUMBERS: Final = frozenset({torch.tensor, torch.as_tensor, Tensor.new_tensor})
"""What builds a tensor out of numbers."""
_REFUSED: Final[set[torch.dtype]] = set()
"""Dtypes that the device does not have."""


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
            device=_DEVICE,
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
    """``func`` of what the tensors hold. Tests call this some millions of times."""
    if func in _OWN:
        return _OWN[func](*args, **kwargs)
    others: dict[int, OtherTensor] = {}
    strays: list[Tensor] = []
    inner_args = [_inner(value, others, strays) for value in args]
    inner_kwargs = {name: _inner(value, others, strays) for name, value in kwargs.items()}
    device = kwargs.get("device")
    there = device is not None and _is_other(device)
    if strays and func not in CROSSING and (others or device is None or there):
        found = ", ".join(f"{t.dtype} {list(t.shape)}" for t in strays)
        raise StrayTensor(f"{func} on the other device got a tensor of the CPU: {found}")
    if there:
        inner_kwargs["device"] = _CPU
    result = func(*inner_args, **inner_kwargs)
    if device is not None and not there:
        return result
    if func is torch.ops.aten.copy_.default and not isinstance(args[0], OtherTensor):
        return args[0]

    return _wrapped(func, result, others)


def _wrapped(func: Any, value: Any, others: Mapping[int, OtherTensor]) -> Any:
    """``value``, which ``func`` gave, with its tensors on the device.

    Args:
        others: tensors of the device that ``func`` was given, by the id of what they hold. What was
            written to in place is returned as the tensor that it was.
    """
    if not isinstance(value, Tensor):
        if isinstance(value, tuple | list):
            return type(value)([_wrapped(func, one, others) for one in value])
        return value
    if _REFUSED and value.dtype in _REFUSED:
        raise StrayTensor(f"{func} made a tensor of {value.dtype} on the other device")
    known = others.get(id(value))
    if known is None:
        return OtherTensor(value)
    assert known.shape == value.shape, f"{func} resized a tensor"
    return known


def _inner(value: Any, others: dict[int, OtherTensor], strays: list[Tensor]) -> Any:
    """``value`` with what the device's tensors hold.

    PyTorch's own functions for nested values would take most of the time of a call.

    Args:
        others: gets tensors of the device, by the id of what they hold.
        strays: gets those of the CPU that are no numbers.
    """
    if isinstance(value, OtherTensor):
        inner = value.inner
        others[id(inner)] = value
        return inner
    if isinstance(value, Tensor):
        if value.ndim:
            strays.append(value)
        return value
    if isinstance(value, tuple | list):
        return type(value)([_inner(one, others, strays) for one in value])
    return value


@contextmanager
def without_float64() -> Iterator[None]:
    """The device computes no float64 meanwhile, as Apple's GPUs do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_module, "has_float64", lambda device: device.type != NAME)
        _REFUSED.add(torch.float64)
        try:
            yield
        finally:
            _REFUSED.clear()


def _is_other(device: Any) -> bool:
    return torch.device(device).type == NAME


def _from_numbers(func: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """``func``, one of `_FROM_NUMBERS`, by way of the CPU if its tensor shall be of the device."""
    device = named.get("device")
    if device is not None and func is not Tensor.new_tensor and _is_other(device):
        return func(*args, **named | {"device": "cpu"}).to(device)
    if func is Tensor.new_tensor and isinstance(args[0], OtherTensor):
        like, numbers = args
        return torch.tensor(numbers, **{"dtype": like.dtype, "device": "cpu"} | named).to(NAME)
    return func(*args, **named)


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
        if func in _FROM_NUMBERS:
            return _from_numbers(func, args, dict(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)


class _Module(backend_registration._DummyBackendModule):
    """What ``torch.other`` is. Who asks PyTorch for devices to use does not hear of this one."""

    def is_available(self) -> bool:
        """Only by its name."""
        return False

    def device_count(self) -> int:
        """None has a state of its own, such as random numbers."""
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """What `torch.autocast` may ask for."""
        return [torch.bfloat16, torch.float16]


def _made(func: Any, *args: Any, **kwargs: Any) -> Any:
    """The kernel of every function of PyTorch that reaches the device by its name."""
    return _computed(func, args, kwargs)


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
_CPU: Final = torch.device("cpu")
_DEVICE: Final = torch.device(NAME, 0)
# Both unregister what they hold when they are collected.
_EVERYTHING: Final = torch.library.Library("_", "IMPL")
_EVERYTHING.fallback(_made, "PrivateUse1")
_FACTORIES: Final = torch.library.Library("aten", "IMPL")
for _factory in _FILLING:
    _FACTORIES.impl(_factory, functools.partial(_made, _factory), "PrivateUse1")
_OWN: Final[dict[Any, Callable[..., Any]]] = {
    bits.unpack._opoverload: bits.unpack._init_fn,
    packing.round_states._opoverload: packing.round_states._init_fn,
    packing._pack_states._opoverload: packing._pack_states._init_fn,
}
"""quantine's own functions meet its tensors as they are, and choose kernels by them."""


def moved(value: Any, device: str, memo: dict[int, Any] | None = None) -> Any:
    """Copies on ``device`` of all tensors in ``value``; what was one tensor stays one."""
    memo = {} if memo is None else memo
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = value.to(device, copy=True)
        return memo[id(value)]
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(device)
    if isinstance(value, tuple | list):
        return type(value)(moved(one, device, memo) for one in value)
    if isinstance(value, dict):
        return {key: moved(one, device, memo) for key, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **moved(fields, device, memo))
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in ``value``, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for one in value.values() for tensor in tensors_in(one)]
    if isinstance(value, tuple | list):
        return [tensor for one in value for tensor in tensors_in(one)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tensors_in([getattr(value, f.name) for f in dataclasses.fields(value)])
    return []


def numbers_in(value: Any) -> list[float]:
    """All numbers in the tuples and lists of ``value``, in order."""
    if isinstance(value, tuple | list):
        return [number for one in value for number in numbers_in(one)]
    return [value] if isinstance(value, int | float) else []


@contextmanager
def no_extension() -> Iterator[None]:
    """Let the CPU have the references, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "native", lambda: None)
        yield


@contextmanager
def untouched_extension() -> Iterator[None]:
    """Fail where the extension is used, though it is there."""

    def refuse() -> NoReturn:
        raise AssertionError("tensors of another device reached native code")

    assert backend.native() is not None, "the native extension is off or missing"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "extension", refuse)
        yield


def check_same(function: Callable[..., Any], *args: Any) -> Any:
    """Check that ``function`` finds the same bits of ``args`` on the other device, and there.

    Returns:
        What it found on the CPU.
    """
    with no_extension():
        expected = function(*moved(args, "cpu"))
    with OtherDevice(), untouched_extension():
        found = function(*moved(args, NAME))
    own, others = tensors_in(expected), tensors_in(found)
    assert len(own) == len(others)
    assert own or numbers_in(expected), "nothing is compared"
    for one, other in zip(own, others, strict=True):
        assert other.device.type == NAME, f"a result of shape {list(other.shape)} left the device"
        torch.testing.assert_close(other.cpu(), one, rtol=0, atol=0, equal_nan=True)
    assert numbers_in(found) == numbers_in(expected)
    return expected
