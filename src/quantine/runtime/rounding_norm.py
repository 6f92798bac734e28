"""Norms whose channels are reordered, in one launch with the rounding of what they write."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from quantine.activations.modules import PermutedNorm
from quantine.core.overrides import is_overridden
from quantine.families.family import Family
from quantine.kernels import backend, integer
from quantine.kernels.integer.units.inputs import InputUnits, Norm
from quantine.runtime.definitions import patched_method
from quantine.runtime.modules import QuantLinear
from quantine.runtime.packed import takes_kernels
from quantine.runtime.shared_input import SharedInput
from quantine.runtime.snapshot import Snapshot

PLUS_ONE: Final = frozenset({"Gemma2RMSNorm", "Gemma3RMSNorm"})
"""Norms of transformers that multiply by one plus their weight."""


class RoundingNorm(PermutedNorm):
    """A `PermutedNorm` that on a GPU also rounds what it writes, for the matrices that read it.

    It writes the same floats for whoever reads them, and `SharedInput` has their codes. Where it
    cannot be one launch, the norm computes as in its base class, and matrices round its result.
    That is so until the matrices are arranged, in a model's first forward.

    Args:
        of: the norm that it takes the place of, whose tensors it shares.
        shared: what the matrices share that read what it writes.
    """

    def __init__(self, of: PermutedNorm, shared: SharedInput) -> None:
        super().__init__(of.norm, of.get_buffer("order"))
        self.shared = shared
        self._gathered: InputUnits | None = None
        self._gathered_for: InputUnits | None = None
        self._gathered_from: Snapshot | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The norm of ``x`` ``[..., channels]``, its channels reordered."""
        if backend.is_recorded():
            return super().forward(x)
        self.shared.forget()  # what a matrix has not read of another input
        inputs = self.shared.expected()
        norm = None if inputs is None or not self._computes(x, inputs) else norm_of(self.norm)
        if inputs is None or norm is None:
            return super().forward(x)
        rows, units = x.reshape(-1, inputs.columns), self._gather(inputs).after(norm)
        normed, rounded = integer.normed_and_rounded(rows, units)
        normed = normed.view(x.shape)
        self.shared.keep(normed, inputs, rounded)
        return normed

    def _computes(self, x: Tensor, inputs: InputUnits) -> bool:
        """Whether programs may compute: no hook and no gradient, and codes can be shared."""
        if not takes_kernels(x) or backend.of(x) != "triton" or is_overridden(self.norm):
            return False
        tensors = [*self.norm.parameters(), *self.norm.buffers()]
        placed = all(t.device == x.device and t.dtype == x.dtype for t in tensors)
        there = self.get_buffer("order").device == inputs.source.device == x.device
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        cast = torch.is_autocast_enabled(x.device.type)
        return placed and there and not (wanted or cast or torch.is_inference_mode_enabled())

    def _gather(self, inputs: InputUnits) -> InputUnits:
        """``inputs`` in the order of this norm, made again when one of both changes."""
        order = self.get_buffer("order")
        fresh = self._gathered_from is not None and self._gathered_from.holds([order])
        if not fresh or self._gathered is None or self._gathered_for is not inputs:
            self._gathered, self._gathered_for = inputs.gathered(order), inputs
            self._gathered_from = Snapshot([order])
        return self._gathered

    def __getstate__(self) -> dict[str, Any]:
        """The state without what was made for programs."""
        none = {"_gathered": None, "_gathered_for": None, "_gathered_from": None}
        return {**self.__dict__, **none}


def norm_of(module: nn.Module) -> Norm | None:
    """What ``module`` computes, as programs do; ``None`` where they know no such norm.

    They know ``LayerNorm``, and RMS norms of transformers. Those that have ``variance_epsilon``
    multiply what they have divided by their ``weight``; of others only `PLUS_ONE` are known.
    """
    kind: type[nn.Module] = type(module)
    norm: Any = module
    if patched_method(kind) is not None or getattr(norm, "weight", None) is None:
        return None
    if kind is nn.LayerNorm:
        plain = len(norm.normalized_shape) == 1
        return Norm(norm.weight.detach(), _detached(norm.bias), norm.eps, True) if plain else None
    own = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith("RMSNorm")
    if not own or hasattr(norm, "bias"):
        return None
    if kind.__name__ in PLUS_ONE:
        return Norm(norm.weight.detach().float() + 1.0, None, norm.eps, False)
    if not hasattr(norm, "variance_epsilon"):
        return None
    return Norm(norm.weight.detach(), None, norm.variance_epsilon, False)


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
                setattr(block.get_submodule(parent), leaf, RoundingNorm(norm, shared))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
