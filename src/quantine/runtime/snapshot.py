"""Whether tensors are still those that something was made from."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor


class Snapshot:
    """The identity of some tensors, which it does not keep alive.

    Args:
        tensors: in an order of their own.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._seen = [(weakref.ref(t), t.data_ptr(), _version(t)) for t in tensors]

    def holds(self, tensors: Iterable[Tensor]) -> bool:
        """Whether ``tensors`` are the same ones, and nobody wrote to them since.

        Writing through ``tensor.data`` is not noticed.
        """
        found = list(tensors)
        return len(found) == len(self._seen) and all(
            kept() is tensor and place == tensor.data_ptr() and version == _version(tensor)
            for (kept, place, version), tensor in zip(self._seen, found, strict=True)
        )


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode count no versions.
    return 0 if tensor.is_inference() else tensor._version
