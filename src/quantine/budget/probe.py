"""Predicts what every choice would cost each layer: bytes, and divergence of predictions.

Some calibration segments run through the float model once, forward and backward. On the way forward
the errors of each layer's outputs are predicted; on the way back they are weighted by how much the
model's predictions depend on each output, see `quantine.statistics.gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Protocol

from torch import Tensor

from quantine.calibrate.backward import there_and_back
from quantine.calibrate.block_loader import BlockLoader
from quantine.calibrate.sequential import Sequential
from quantine.calibrate.setup import CalibrationSetup
from quantine.core.spec import QuantSpec
from quantine.errors import SolverError
from quantine.families.layers import Layer
from quantine.methods.solver import Solver
from quantine.methods.spqr import SpQR, row_run, sampled_rows
from quantine.statistics.gradients import SquaredGradients
from quantine.statistics.hessian import Hessian

PROBE_TOKENS: Final = 4096
"""Number of calibration tokens, at least, by which choices are ranked."""
PROBE_SHARE: Final = 4
"""One of so many segments is probed where that is more and tokens count by the loss: gradients of
all of them were taken then, which takes longer. A prediction on few tokens flatters the matrices
with most inputs, whose errors it thinks they could make up for."""

Options = list[tuple[int, float]]
"""Size in bytes and loss of each choice of one layer. The loss is the expected Kullback-Leibler
divergence, in nats per token, between the model's predictions before and after."""


class BudgetChoice(Protocol):
    """One way to quantize a layer: method ``spqr`` with its parameters, and a grid."""

    @property
    def solver(self) -> Solver:
        """The method, with its parameters."""
        ...

    @property
    def spec(self) -> QuantSpec:
        """The grid to quantize on."""
        ...

    def expected_nbytes(self, layer: Layer, outlier_share: float) -> int:
        """Packed bytes of ``layer`` if that share (0 to 1) of its weights are outliers."""
        ...


@dataclass(frozen=True)
class Budgeted:
    """A layer that a budget decides about, and the choices it may get."""

    layer: Layer
    choices: Sequence[Any]
    """The choices, each a `BudgetChoice`."""


@dataclass(frozen=True)
class _Prediction:
    """What a choice would do to a layer.

    Attributes:
        nbytes: packed size in bytes.
        losses: mean squared errors of the outputs in ``rows``, float32.
        rows: int64 indices of the outputs that stand for all.
    """

    nbytes: int
    losses: Tensor
    rows: Tensor

    def option(self, squared_gradients: Tensor) -> tuple[int, float]:
        """Size and loss of the choice.

        Args:
            squared_gradients: mean squared gradient of each output, ``[out]`` float32.
        """
        sampled = float((squared_gradients[self.rows] * self.losses).sum())
        return self.nbytes, sampled / 2 * len(squared_gradients) / len(self.rows)


def probe_segments(samples: int, seqlen: int, weighted: bool) -> int:
    """The number of segments that are probed: at least one, see `PROBE_TOKENS`, `PROBE_SHARE`.

    Args:
        samples: number of calibration segments.
        seqlen: tokens per segment.
        weighted: whether tokens count by the loss.
    """
    share = samples // PROBE_SHARE if weighted else 0
    return min(samples, max(1, PROBE_TOKENS // max(1, seqlen), share))


def probe(
    setup: CalibrationSetup,
    loader: BlockLoader,
    budgeted: Sequence[Budgeted],
    observed: Callable[[int, int], Layer],
    read: Callable[[str], Tensor],
    scratch: Path,
    seed: int,
    note: Callable[[str], None],
) -> dict[str, Options]:
    """Size and loss of every choice of every layer that shares the budget.

    Args:
        setup: the calibration segments, of which the first are used, and the model.
        loader: gives the blocks their weights.
        budgeted: the layers with their choices, in running order.
        observed: returns, for a block and a group number, a layer that reads the group's input.
        read: reads the float tensor that the model calls by a name.
        scratch: directory for the inputs of all blocks.
        seed: seed of the generator that draws tokens from the predictions.
        note: receives lines about the progress.

    Returns:
        By layer name, size in bytes and loss of each choice.

    Raises:
        SolverError: a layer cannot be solved with a choice; the message names it.
    """
    samples, seqlen = setup.segments.shape
    count = probe_segments(samples, seqlen, bool(setup.token_weights))
    own = replace(setup, segments=setup.segments[:count], spill=scratch / "states", replaced={})
    predicted: dict[str, list[_Prediction]] = {}

    def predict(index: int, sequential: Sequential) -> None:
        inside = [one for one in budgeted if one.layer.block == index]
        predicted.update(_predict_block(index, inside, observed, read, sequential))

    layers = [one.layer for one in budgeted if one.layer.block is not None]
    steps = there_and_back(
        own,
        loader,
        layers,
        SquaredGradients,
        read,
        scratch,
        seed,
        lambda said: note(f"probing {said}"),
        predict,
    )
    table: dict[str, Options] = {}
    for index, squares in steps:
        inside = [layer for layer in layers if layer.block == index]
        for layer in inside:
            mean = _mean_gradient(layer, inside, squares, own.segments.numel())
            table[layer.name] = [one.option(mean) for one in predicted[layer.name]]
    return table


def _predict_block(
    index: int,
    inside: Sequence[Budgeted],
    observed: Callable[[int, int], Layer],
    read: Callable[[str], Tensor],
    sequential: Sequential,
) -> dict[str, list[_Prediction]]:
    """Predictions for the layers of a block, by name, in the order of their choices.

    Args:
        index: number of the block, which is the next of ``sequential`` and loaded.
        inside: its layers with their choices.
        observed: as for `probe`.
        read: as for `probe`.
        sequential: runs the block.
    """
    found: dict[str, list[_Prediction]] = {}
    alone = bool(sequential.setup.token_weights)  # matrices then share no Hessian of their input
    groups = sorted({one.layer.group or 0 for one in inside})
    layers = [one.layer for one in inside] if alone else [observed(index, one) for one in groups]
    for _, stage in groupby(layers, lambda layer: layer.stage):
        alike = list(stage)
        for layer, hessian in zip(alike, sequential.observe_next(index, alike), strict=True):
            members = [
                one
                for one in inside
                if one.layer == layer or (not alone and one.layer.group == layer.group)
            ]
            with sequential.setup.times.stage("fits"):
                found.update(_predict_group(members, read, hessian))
    return found


def _mean_gradient(
    layer: Layer, layers: Sequence[Layer], squares: Mapping[str, SquaredGradients], tokens: int
) -> Tensor:
    """The mean over ``tokens`` of the squared gradient of each output of ``layer``, ``[out]``.

    Tokens that did not choose an expert count as zero, so that the rarely chosen get fewer bits.
    One that none chose counts as if a single token had, with the mean gradient of the others.
    """
    own = squares[layer.name]
    if own.tokens:
        return own.mean(tokens)
    others = SquaredGradients()
    for other in layers:
        if other.stage == layer.stage:
            others.merge(squares[other.name])
    return others.mean() / tokens


def _predict_group(
    members: Sequence[Budgeted], read: Callable[[str], Tensor], hessian: Hessian
) -> dict[str, list[_Prediction]]:
    """Predictions for layers that read the same input, by name, in the order of their choices.

    Args:
        members: the layers with their choices.
        read: reads the float tensor that the model calls by a name.
        hessian: statistics of the shared input.
    """
    rows = {one.layer: _sample(one) for one in members}
    weights = {layer: _float_rows(layer, read, rows[layer]) for layer in rows}
    found: dict[tuple[Layer, BudgetChoice], _Prediction] = {}
    # Choices with one solving order come together, so that they share the Hessian's factor.
    choices: dict[BudgetChoice, None] = dict.fromkeys(c for one in members for c in one.choices)
    for choice in sorted(choices, key=lambda c: (c.spec.group_axis, c.spec.group_size)):
        for one in members:
            if choice in one.choices:
                layer = one.layer
                found[layer, choice] = _predict(layer, choice, weights[layer], rows[layer], hessian)
    return {one.layer.name: [found[one.layer, choice] for choice in one.choices] for one in members}


def _sample(one: Budgeted) -> Tensor:
    """Indices of rows that stand for a layer, the same for all of its choices."""
    out_features = one.layer.out_features
    runs = (row_run(choice.spec, out_features) for choice in one.choices)
    return sampled_rows(out_features, math.lcm(*runs))


def _float_rows(layer: Layer, read: Callable[[str], Tensor], rows: Tensor) -> Tensor:
    """The chosen ``rows`` of the float weight of ``layer``, ``[rows, in]`` float32."""
    return layer.part_of(read(layer.stored_name)).float()[rows]


def _predict(
    layer: Layer, choice: BudgetChoice, weight: Tensor, rows: Tensor, hessian: Hessian
) -> _Prediction:
    """Predict size and loss of one choice.

    Args:
        layer: the layer.
        choice: a choice of method ``spqr``.
        weight: the sampled rows of its float weight, ``[rows, in]`` float32.
        rows: int64 indices of these rows.
        hessian: statistics of its input.

    Raises:
        SolverError: the layer cannot be solved; the message names it.
    """
    solver = choice.solver
    assert isinstance(solver, SpQR)
    on_device = weight.to(hessian.matrix.device)
    try:
        losses, share = solver.predict(on_device, hessian, choice.spec)
    except SolverError as error:
        raise SolverError(f"{layer.name}: {error}") from error
    nbytes = choice.expected_nbytes(layer, share)
    return _Prediction(nbytes, losses, rows.to(losses.device))
