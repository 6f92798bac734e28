"""Codes of an input that several packed matrices read: rounded once, read by all."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantine.kernels import integer
from quantine.kernels.integer.units.inputs import InputUnits, Rounded
from quantine.runtime.snapshot import Snapshot


@dataclass(frozen=True)
class _Kept:
    """Codes that readers still want.

    Attributes:
        seen: the tensor ``x`` whose codes these are.
        inputs: how it was rounded.
        rounded: the codes.
        place: where they were computed, see `_place`.
        read: numbers of the readers that have had them.
    """

    seen: Snapshot
    inputs: InputUnits
    rounded: Rounded
    place: object
    read: set[int]


class SharedInput:
    """Codes of the input of some matrices of a block, such as q, k and v.

    Codes belong to one tensor, as it is: a reader that gets another one, or the same one after
    somebody wrote to it, or that rounds it otherwise, has codes of its own. So hooks, adapters and
    replaced modules need no care. Codes are kept until every reader has had them once, or the
    tensor is gone. A copy of a model has none.

    Args:
        readers: number of matrices that read the input.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._units: list[weakref.ref[InputUnits]] = []
        self._kept: _Kept | None = None
        self._watched: weakref.ref[Tensor] | None = None

    def one_of(self, inputs: InputUnits) -> InputUnits:
        """``inputs``, or what another reader has here already, if that is equal."""
        there = [found for kept in self._units if (found := kept()) is not None]
        equal = next((found for found in there if found.equals(inputs)), None)
        if equal is None:
            self._units = [weakref.ref(found) for found in (*there, inputs)]
        return equal or inputs

    def rounded(self, x: Tensor, inputs: InputUnits, reader: int) -> Rounded:
        """The codes of ``x``, from another reader if it has made the same ones.

        Args:
            x: ``[..., columns]``, as the reader got it.
            inputs: from `one_of`.
            reader: number of the reader.
        """
        kept = self._kept
        if kept is not None and reader not in kept.read and _fits(kept, x, inputs):
            kept.read.add(reader)
            if len(kept.read) == self.readers:
                self._forget()
            return kept.rounded
        rounded = integer.rounded(x.reshape(-1, inputs.columns), inputs)
        self.keep(x, inputs, rounded, {reader})
        return rounded

    def keep(self, x: Tensor, inputs: InputUnits, rounded: Rounded, read: set[int]) -> None:
        """Keep the codes of ``x`` for readers that have not ``read`` them.

        Nothing is kept of tensors made in inference mode, which do not count what is written to
        them.
        """
        self._forget()
        if len(read) < self.readers and not x.is_inference():
            self._kept = _Kept(Snapshot([x]), inputs, rounded, _place(x), read)
            self._watched = weakref.ref(x, self._gone)

    def _gone(self, watched: weakref.ref[Tensor]) -> None:
        if watched is self._watched:
            self._forget()

    def _forget(self) -> None:
        self._kept = self._watched = None

    def __getstate__(self) -> dict[str, Any]:
        """The state without codes: copies make their own."""
        return {"readers": self.readers, "_units": [], "_kept": None, "_watched": None}


def _fits(kept: _Kept, x: Tensor, inputs: InputUnits) -> bool:
    return kept.inputs is inputs and kept.seen.holds([x]) and kept.place == _place(x)


def _place(x: Tensor) -> object:
    """What a computation with ``x`` is ordered by: codes of another stream may not be there yet.

    What was computed outside of a CUDA graph is not in the graph.
    """
    if x.device.type != "cuda":
        return None
    with torch.cuda.device(x.device):
        return torch.cuda.current_stream(), torch.cuda.is_current_stream_capturing()
