"""Noticing that tensors, from which something was computed, have been replaced or changed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor


class Snapshot:
    """Remembers the identity and version of some tensors, without keeping them alive.

    Args:
        tensors: the tensors, in an order that `holds` is given them in again.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._seen = [(weakref.ref(t), t.data_ptr(), _version(t)) for t in tensors]

    def holds(self, tensors: Iterable[Tensor]) -> bool:
        """Whether ``tensors`` are the same ones in the same order, and were not written to since.

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
