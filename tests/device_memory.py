"""Counts the bytes that live on the other device of tests."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from other_device import OtherTensor


class Meter:
    """Bytes of the storages that tensors of the other device hold.

    Attributes:
        live: now.
        peak: at most, so far or since it was last set.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._holders: Counter[int] = Counter()
        self._watches: dict[int, weakref.ref[OtherTensor]] = {}

    def hold(self, tensor: OtherTensor) -> None:
        """Count the storage of ``tensor`` until no tensor holds it."""
        storage = tensor.inner.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not size:
            return
        self._holders[place] += 1
        if self._holders[place] == 1:
            self.live += size
            self.peak = max(self.peak, self.live)
        watch = weakref.ref(tensor, functools.partial(self._drop, place, size))
        self._watches[id(watch)] = watch

    def _drop(self, place: int, size: int, watch: weakref.ref[OtherTensor]) -> None:
        del self._watches[id(watch)]
        self._holders[place] -= 1
        if not self._holders[place]:
            del self._holders[place]
            self.live -= size


@contextmanager
def metered() -> Iterator[Meter]:
    """Count what tensors of the other device hold that are made in this context."""
    meter = Meter()
    plain = OtherTensor.__init__

    def counted(self: OtherTensor, inner: torch.Tensor) -> Any:
        plain(self, inner)
        meter.hold(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OtherTensor, "__init__", counted)
        yield meter
