"""Codes of an input that several packed matrices read: rounded once, read by all."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantine.kernels import integer
from quantine.kernels.integer.units.inputs import InputUnits, Rounded
from quantine.runtime.recording import recording
from quantine.runtime.snapshot import Snapshot


@dataclass(frozen=True)
class _Kept:
    """Codes that readers still want.

    Attributes:
        seen: the tensor whose codes these are.
        place: where they were computed, see `_place`.
        codes: ways to round it, each with what it made.
        read: numbers of the readers that have had theirs.
    """

    seen: Snapshot
    place: object
    codes: list[tuple[InputUnits, Rounded]] = field(default_factory=list)
    read: set[int] = field(default_factory=set)


class SharedInput:
    """Codes of the input of some matrices of a block, such as q, k and v.

    A reader gets codes that another reader or the norm before has made, if all of this holds; else
    it makes them itself:

    * It reads the very tensor that was rounded, not an equal one, and nobody has written to that
      since, as PyTorch's count of its versions tells. So hooks, adapters and replaced modules need
      no care. Only a write that PyTorch does not count (through ``tensor.data``, or by a program
      that gets the tensor's address) between the calls of two readers is not noticed.
    * The tensor was not made in inference mode, where PyTorch counts no versions.
    * Both round it in the same way, see `one_of`.
    * Both compute in the same CUDA stream, and in the same recording of a CUDA graph, or in none.
    * The reader has not had codes since they were made: one that comes again begins anew.

    Codes go when every reader has had them, when the tensor is gone, or when `forget` is called,
    which the norm does. A copy of a model has none.

    Args:
        readers: number of matrices that read the input.
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._units: list[weakref.ref[InputUnits]] = []
        self._kept: _Kept | None = None
        self._watched: weakref.ref[Tensor] | None = None

    def one_of(self, inputs: InputUnits) -> InputUnits:
        """``inputs``, or those of another reader that are equal; these may share codes."""
        there = self._there()
        equal = next((found for found in there if found.equals(inputs)), None)
        if equal is None:
            self._units = [weakref.ref(found) for found in (*there, inputs)]
        return equal or inputs

    def expected(self) -> InputUnits | None:
        """How a reader rounds the input; ``None`` as long as no reader has said so."""
        return next(iter(self._there()), None)

    def rounded(self, x: Tensor, inputs: InputUnits, reader: int) -> Rounded:
        """The codes of ``x``, from another reader if it has made the same ones.

        Args:
            x: ``[..., columns]``, as the reader got it.
            inputs: from `one_of`.
            reader: number of the reader.
        """
        kept = self._kept
        if kept is None or reader in kept.read or not _fits(kept, x):
            kept = self._keep(x)
        found = next((codes for units, codes in kept.codes if units is inputs), None)
        if found is None:
            found = integer.rounded(x.reshape(-1, inputs.columns), inputs)
            kept.codes.append((inputs, found))
        kept.read.add(reader)
        if len(kept.read) == self.readers:
            self.forget()
        return found

    def keep(self, x: Tensor, inputs: InputUnits, rounded: Rounded) -> None:
        """Keep the codes of ``x`` for readers that round it as ``inputs`` says."""
        self._keep(x).codes.append((inputs, rounded))

    def forget(self) -> None:
        """Let go of all codes."""
        self._kept = self._watched = None

    def _keep(self, x: Tensor) -> _Kept:
        """An empty place for codes of ``x``, which nobody finds again if versions do not count."""
        self.forget()
        made = _Kept(Snapshot([x]), _place(x))
        if not x.is_inference():
            self._kept, self._watched = made, weakref.ref(x, self._gone)
        return made

    def _gone(self, watched: weakref.ref[Tensor]) -> None:
        if watched is self._watched:
            self.forget()

    def _there(self) -> list[InputUnits]:
        return [found for kept in self._units if (found := kept()) is not None]

    def __getstate__(self) -> dict[str, Any]:
        """The state without codes: copies make their own."""
        return {"readers": self.readers, "_units": [], "_kept": None, "_watched": None}


def _fits(kept: _Kept, x: Tensor) -> bool:
    return kept.seen.holds([x]) and kept.place == _place(x)


def _place(x: Tensor) -> object:
    """What a computation with ``x`` is ordered by: codes of another stream may not be there yet.

    What was computed outside of a CUDA graph, or in another one, is not in the graph.
    """
    if x.device.type != "cuda":
        return None
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream()
        return stream, recording(stream)
