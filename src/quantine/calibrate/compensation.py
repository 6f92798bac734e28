"""Matrices that also make up for errors before them, which the float model's outputs show.

The float model runs beside the quantized one, block by block. A matrix that writes to hidden states
is changed before it is solved, so that the block comes nearer to what it puts out in the float
model: see `quantine.statistics.error_fit`. On text that a change was not made of, it has to do
so, or the matrix stays as it is: outputs may act on the block's in another way than by being added
to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from quantine.calibrate.input_observer import as_multiplied
from quantine.calibrate.sequential import Sequential
from quantine.calibrate.setup import CalibrationSetup
from quantine.errors import CalibrationError
from quantine.families.family import Family
from quantine.families.layers import Layer
from quantine.kernels.gram import add_gram
from quantine.statistics.error_fit import RIDGES, ErrorFit, is_loud, trust

FLOATS: Final = "float"
"""Name of the directory, in that of hidden states, with those of the float model."""
JUDGED: Final = 8
"""One of so many batches, and at least one, judges changes made of all others."""


def may_write(family: Family, layer: Layer, width: int) -> bool:
    """Whether a matrix may write to hidden states: alone in its group, which is not the first.

    Whether it does, text says.

    Args:
        family: the architecture.
        layer: the matrix.
        width: number of channels of hidden states.
    """
    if layer.block is None or layer.experts or layer.out_features != width:
        return False
    path = layer.name.removeprefix(f"{family.blocks}.{layer.block}.")
    return (path,) in family.groups_in(layer.block)[1:]


class Compensation:
    """The float model beside the quantized one, and what matrices make of the difference.

    Args:
        setup: model, weights and segments of the quantized model, in one shard. Where that is
            one batch, no matrix is changed.
        done: number of blocks, from the first, that an earlier process finished.
    """

    def __init__(self, setup: CalibrationSetup, done: int) -> None:
        spill, saved = (
            None if directory is None else directory / FLOATS
            for directory in (setup.spill, setup.saved)
        )
        own = replace(setup, spill=spill, saved=saved, replaced={}, resumes=False, token_weights={})
        kept = spill or saved
        begun = done or (kept is not None and kept.is_dir() and any(kept.iterdir()))
        # It passes a block before that is finished, so it may be one block further.
        self._floats = Sequential(own, done + 1 if begun else 0)
        self._width, count = self._floats.hidden[0].shape[-1], len(self._floats.hidden)
        self._learns = range(count - max(1, count // JUDGED))
        self._judges = range(len(self._learns), count)

    @property
    def block(self) -> int:
        """Number of the block that comes first."""
        return self._floats.block

    @property
    def lost(self) -> str | None:
        """See `Sequential.lost`."""
        return self._floats.lost

    def reaches(self, layer: Layer) -> bool:
        """Whether a matrix may write to hidden states, see `may_write`."""
        return may_write(self._floats.setup.family, layer, self._width)

    def advance(self, index: int) -> None:
        """Let the float model pass block ``index``, which has its float weights.

        Raises:
            CalibrationError: an output is infinite or NaN.
        """
        try:
            self._floats.advance(index)
        except CalibrationError as error:
            raise CalibrationError(
                f"block {index} of the float model puts out non-finite values on the calibration "
                "text, by which nothing can be corrected: give another text, or leave out "
                "compensate"
            ) from error

    @torch.no_grad()
    def changed(
        self, sequential: Sequential, layer: Layer, weight: Tensor
    ) -> tuple[Tensor, float] | None:
        """The weight that makes up for errors before it.

        Args:
            sequential: the quantized model at the block of the matrix, with what is solved.
            layer: the matrix, which `reaches` them; the model has its float weight.
            weight: that weight, ``[out, in]`` float32.

        Returns:
            The changed weight, and the share of the squared error, as tokens count, that it takes
            off on text that judges; ``None`` if that does not become smaller.
        """
        if not self._learns:
            return None
        learned, judging = (
            ErrorFit(layer.out_features, layer.in_features, add_gram, weight.device)
            for _ in range(2)
        )
        if self._fit(sequential, layer, self._learns, learned) is None:
            return None
        counts = self._fit(sequential, layer, self._judges, judging)
        first = predicted_best(learned, judging)
        if counts is None or first is None:
            return None
        best, least = None, math.inf
        # Where norms follow, less than what is predicted comes of it, and a larger ridge is best.
        for ridge in RIDGES[first:]:
            change = learned.change(ridge)
            if change is None:
                break
            squared = self._squared(sequential, layer, weight, change, counts)
            if not squared < least:
                break
            best, least = change, squared
        if best is None or not least < judging.squared:
            return None
        return weight + best, 1 - least / judging.squared

    def _fit(
        self, sequential: Sequential, layer: Layer, batches: Sequence[int], fit: ErrorFit
    ) -> list[Tensor] | None:
        """Add the errors of the block's outputs for some batches to ``fit``.

        Returns:
            How much the tokens of each batch count; ``None`` if the matrix does not run once for
            each token.
        """
        inputs: list[Tensor] = []
        handle = layer.observe(sequential.setup.model, inputs.append)
        kept = []
        try:
            for batch in batches:
                inputs.clear()
                errors, loud = self._errors(sequential, layer, batch)
                counts = trust(errors, loud)
                kept.append(counts)
                if len(inputs) != 1 or inputs[0].shape[:-1].numel() != counts.numel():
                    return None
                x = as_multiplied(inputs[0].flatten(0, -2), sequential.setup)
                fit.update(x, errors.flatten(0, -2), counts.flatten(), loud.flatten())
        finally:
            handle.remove()
        return kept

    def _squared(
        self,
        sequential: Sequential,
        layer: Layer,
        weight: Tensor,
        change: Tensor,
        counts: Sequence[Tensor],
    ) -> float:
        """The squared error of the block's outputs with ``weight + change`` on text that judges.

        Args:
            sequential: see `changed`.
            layer: the matrix.
            weight: what the model computes with before and afterwards.
            change: what is added to it.
            counts: how much the tokens of each batch that judges count.
        """
        layer.write(sequential.setup.model, weight + change)
        total = 0.0
        for batch, count in zip(self._judges, counts, strict=True):
            errors, _ = self._errors(sequential, layer, batch)
            total += float((count * errors.square().sum(-1)).sum())
        layer.write(sequential.setup.model, weight)
        return total

    def _errors(self, sequential: Sequential, layer: Layer, batch: int) -> tuple[Tensor, Tensor]:
        """Errors of the block's outputs for a batch, and which tokens are loud."""
        assert layer.block is not None
        wanted = self._floats.hidden[batch]
        output = sequential.run(layer.block, sequential.hidden[batch])
        return output - wanted, is_loud(wanted)


def predicted_best(learned: ErrorFit, judging: ErrorFit) -> int | None:
    """The number of the ridge whose change, made of ``learned``, takes most off ``judging``.

    ``None`` if none takes anything off. Blocks are taken to add what the matrix puts out.
    """
    best, most = None, 0.0
    for number, ridge in enumerate(RIDGES):
        change = learned.change(ridge)
        if change is not None and (less := judging.taken_off(change)) > most:
            best, most = number, less
    return best
