"""Stopping a block's forward pass at a matrix, and later continuing where it stopped.

GPTQ observes the input of a matrix after the matrices before it in the same block are quantized.
So a forward pass is stopped at the matrix, and resumed once the matrix is quantized.

To resume, the block's forward pass is called again from its start, but the PyTorch functions that
ran before the stop are not computed again: each call returns the result it returned the first time.
Only results that were still in use at the stop are kept. Of each of the others, an empty tensor is
returned, which the forward pass cannot need, as it had dropped the result. It is another one each
time: a function of autograd's that returns its own input makes one more call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DROPPED: Final = object()
"""Stands for a result that was not in use any more."""


class Replay(TorchFunctionMode):
    """A context that repeats the PyTorch calls before the last `stop`, and records those after it.

    The forward pass that runs inside of it must make the same calls in the same order each time,
    and draw no random numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any]] = []  # function, and result as `_loosened`
        self._stopped = 0  # calls that are repeated
        self._place = 0

    def __enter__(self) -> Replay:
        self._place = 0
        # What ran while the last stop was left, such as the end of a `no_grad`.
        del self._calls[self._stopped :]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return the recorded result of a call, or compute and record it.

        Raises:
            RuntimeError: the forward pass calls another function than when it was recorded.
        """
        place = self._place
        self._place += 1
        if place >= self._stopped:
            result = func(*args, **(kwargs or {}))
            self._calls.append((func, _mapped(_loosened, result)))
            return result
        recorded, kept = self._calls[place]
        if recorded != func:
            raise RuntimeError(f"a forward pass called {func}, but {recorded} when it ran before")
        result = _mapped(_present, kept)
        # From here on the computation alone keeps the tensor in use.
        self._calls[place] = func, _mapped(_loosened, result)
        return result

    def stop(self) -> None:
        """Mark this place as the one to resume from, and keep all results that are in use now.

        Called inside of the forward pass, such as in a hook, before an exception leaves it.
        """
        self._calls = [(func, _mapped(_tightened, result)) for func, result in self._calls]
        self._stopped = len(self._calls)


def _mapped(change: Callable[[Any], Any], result: Any) -> Any:
    """``result`` with ``change`` applied to it or, in tuples and lists, to each value inside."""
    if isinstance(result, tuple | list):
        return type(result)(_mapped(change, value) for value in result)
    return change(result)


def _loosened(value: Any) -> Any:
    return weakref.ref(value) if isinstance(value, Tensor) else value


def _tightened(value: Any) -> Any:
    if not isinstance(value, weakref.ref):
        return value
    tensor = value()
    return DROPPED if tensor is None else tensor


def _present(value: Any) -> Any:
    return torch.empty(0, dtype=torch.float32, device="cpu") if value is DROPPED else value
