"""A computation that stops in its middle and later goes on, without a thread of its own.

It goes on by running again from its start. What PyTorch computed the first time is not computed
again: calls return what they returned before. Only tensors that were still in use when it stopped
are kept for that; a call whose result nobody used any more returns an empty one, which nobody sees.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Replay(TorchFunctionMode):
    """While entered, repeats calls of PyTorch functions up to `stop`, and records those after it.

    The computation must make the same calls in the same order each time, and draw nothing at
    random.
    """

    def __init__(self) -> None:
        super().__init__()
        self._nobodys = torch.empty(0, device="cpu")
        self._calls: list[tuple[Any, Any]] = []  # function, and result as `_loosened`
        self._stopped = 0  # calls that are repeated
        self._place = 0

    def __enter__(self) -> Replay:
        self._place = 0
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Repeat or record one call.

        Raises:
            RuntimeError: the computation does not repeat itself.
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
        # From here on the computation alone keeps the tensor in use.
        self._calls[place] = func, _mapped(_loosened, kept)
        return kept

    def stop(self) -> None:
        """Keep what the computation uses now; to be called from inside of it."""
        self._calls = [(func, _mapped(self._tightened, result)) for func, result in self._calls]
        self._stopped = len(self._calls)

    def _tightened(self, value: Any) -> Any:
        if not isinstance(value, weakref.ref):
            return value
        tensor = value()
        return self._nobodys if tensor is None else tensor


def _mapped(change: Callable[[Any], Any], result: Any) -> Any:
    """``result`` of a function with ``change`` applied to each value in its tuples and lists."""
    if isinstance(result, tuple | list):
        return type(result)(_mapped(change, value) for value in result)
    return change(result)


def _loosened(value: Any) -> Any:
    return weakref.ref(value) if isinstance(value, Tensor) else value
