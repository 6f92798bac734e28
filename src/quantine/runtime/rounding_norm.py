"""Norms whose channels are reordered, in one launch with the rounding of what they write."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantine.activations.modules import PermutedNorm
from quantine.core.overrides import is_overridden
from quantine.families.family import Family
from quantine.kernels import integer
from quantine.kernels.integer.units.gridded_matrix import GriddedMatrix
from quantine.kernels.integer.units.inputs import InputUnits, Norm
from quantine.runtime.definitions import patched_method
from quantine.runtime.modules import QuantLinear
from quantine.runtime.packed import takes_kernels
from quantine.runtime.shared_input import SharedInput
from quantine.runtime.snapshot import Snapshot


class RoundingNorm(PermutedNorm):
    """A `PermutedNorm` that on a GPU also rounds what it writes, for the matrices that read it.

    It writes the same floats for whoever reads them, and `SharedInput` has their codes. Where it
    cannot be one launch, the norm computes as in its base class, and matrices round its result.

    Args:
        of: the norm that it takes the place of, whose tensors it shares.
        readers: the matrices that read what it writes, at least one.
        shared: what these share.
    """

    def __init__(
        self, of: PermutedNorm, readers: Sequence[QuantLinear], shared: SharedInput
    ) -> None:
        super().__init__(of.norm, of.get_buffer("order"))
        self.shared = shared
        self._readers = [weakref.ref(reader) for reader in readers]
        self._units: InputUnits | None = None
        self._made_from: Snapshot | None = None
        self._made_for: InputUnits | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The norm of ``x`` ``[..., channels]``, its channels reordered."""
        inputs = self._inputs(x) if self._computes(x) else None
        if inputs is None:
            return super().forward(x)
        units = self._after_norm(inputs)
        normed, rounded = integer.normed_and_rounded(x.reshape(-1, inputs.columns), units)
        normed = normed.view(x.shape)
        self.shared.keep(normed, inputs, rounded, set())
        return normed

    def _computes(self, x: Tensor) -> bool:
        """Whether the norm of ``x`` is what programs compute: no hook sees it, and no gradient."""
        tensors = [*self.norm.parameters(), *self.norm.buffers()]
        placed = all(t.device == x.device and t.dtype == x.dtype for t in tensors)
        if not placed or self.get_buffer("order").device != x.device or not takes_kernels(x):
            return False
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        cast = torch.is_autocast_enabled(x.device.type)
        return not wanted and not cast and not x.is_inference() and not is_overridden(self.norm)

    def _inputs(self, x: Tensor) -> InputUnits | None:
        """How a reader rounds what this writes; ``None`` where none does so by programs.

        A reader with hooks may get its tensors by one.
        """
        if not is_known(self.norm):
            return None
        for kept in self._readers:
            reader = kept()
            if reader is None or is_overridden(reader) or reader.shared is not self.shared:
                continue
            grid = reader.input_grid(x.device)
            if isinstance(grid, GriddedMatrix):
                return grid.inputs
        return None

    def _after_norm(self, inputs: InputUnits) -> InputUnits:
        """``inputs`` after this norm, made again when one of its tensors changes."""
        norm: Any = self.norm
        bias: Tensor | None = getattr(norm, "bias", None)
        tensors = [norm.weight, self.get_buffer("order"), *([] if bias is None else [bias])]
        fresh = self._made_from is not None and self._made_from.holds(tensors)
        centred = type(norm) is nn.LayerNorm
        eps = norm.eps if centred else norm.variance_epsilon
        if not fresh or self._units is None or self._made_for is not inputs:
            order = self.get_buffer("order")
            self._units = inputs.after(
                Norm(norm.weight.detach(), _detached(bias), eps, centred, order)
            )
            self._made_from, self._made_for = Snapshot(tensors), inputs
        return self._units

    def __getstate__(self) -> dict[str, Any]:
        """The state without what was made for programs; readers of copies are their copies."""
        readers = [reader for kept in self._readers if (reader := kept()) is not None]
        none = {"_units": None, "_made_from": None, "_made_for": None}
        return {**self.__dict__, **none, "_readers": readers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a copy's state."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._readers = [weakref.ref(reader) for reader in state["_readers"]]


def is_known(norm: nn.Module) -> bool:
    """Whether ``norm`` is one that programs compute: ``LayerNorm``, or an RMS norm as Llama's.

    Norms of transformers that are called so, and have ``variance_epsilon``, multiply what they have
    divided by their ``weight``. Gemma's, which do otherwise, have ``eps``.
    """
    kind: type[nn.Module] = type(norm)
    if patched_method(kind) is not None or getattr(norm, "weight", None) is None:
        return False
    if isinstance(norm, nn.LayerNorm) and kind is nn.LayerNorm:
        return len(norm.normalized_shape) == 1
    own = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("RMSNorm")
    return own and hasattr(norm, "variance_epsilon") and not hasattr(norm, "bias")


def share_inputs(block: nn.Module, family: Family) -> None:
    """Let the matrices of ``block`` that read one rounded input, and the norm before, share codes.

    Args:
        block: a block whose matrices are packed, with grids and reordered norms installed.
        family: the model's architecture.
    """
    for link in family.links:
        modules = [block.get_submodule(path) for path in link.consumers]
        readers = [m for m in modules if type(m) is QuantLinear and m.inputs is not None]
        if not readers:
            continue
        shared = SharedInput(len(readers))
        for reader in readers:
            reader.shared = shared
        for path in link.producers:
            parent, _, leaf = path.rpartition(".")
            norm = block.get_submodule(path)
            if type(norm) is PermutedNorm:
                setattr(block.get_submodule(parent), leaf, RoundingNorm(norm, readers, shared))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
