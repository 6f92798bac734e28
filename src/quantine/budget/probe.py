"""What every choice of a plan would cost each layer: bytes, and divergence of predictions.

Some calibration segments run through the float model once, forward and backward. Errors of outputs
are predicted on the way forward, and weighted on the way back by how much predictions depend on
each output; see `quantine.statistics.gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from torch import Tensor

from quantine.calibrate.backward import backward, replace_by_gradients
from quantine.calibrate.hidden_states import HiddenStates
from quantine.calibrate.sequential import CalibrationSetup, Sequential
from quantine.core.process_memory import return_freed_memory
from quantine.core.spec import QuantSpec
from quantine.errors import SolverError
from quantine.families.layers import Layer, block_list
from quantine.methods.solver import Solver
from quantine.methods.spqr import SpQR, row_run, sampled_rows
from quantine.statistics.hessian import Hessian

PROBE_TOKENS: Final = 4096
"""Calibration tokens that are enough to rank choices."""

Options = list[tuple[int, float]]
"""Of one layer: bytes and loss of each of its choices."""


class Choice(Protocol):
    """One way to quantize a layer, of method spqr."""

    @property
    def solver(self) -> Solver:
        """Rounds the matrix."""
        ...

    @property
    def spec(self) -> QuantSpec:
        """What is asked of it."""
        ...

    def expected_nbytes(self, layer: Layer, outlier_share: float) -> int:
        """Packed bytes with that share of outliers."""
        ...


@dataclass(frozen=True)
class Budgeted:
    """A layer that a budget decides about, and what it may get."""

    layer: Layer
    choices: Sequence[Any]
    """Of `Choice`."""


@dataclass(frozen=True)
class _Prediction:
    """What a choice would do to a layer.

    Attributes:
        nbytes: packed bytes.
        losses: mean squared errors of the outputs at ``rows``, float32.
        rows: int64 indices of the outputs that stand for all.
    """

    nbytes: int
    losses: Tensor
    rows: Tensor

    def option(self, squared_gradients: Tensor) -> tuple[int, float]:
        """Bytes and loss, given the mean squared gradient of each output ``[out]``."""
        sampled = float((squared_gradients[self.rows] * self.losses).sum())
        return self.nbytes, sampled / 2 * len(squared_gradients) / len(self.rows)


def probe_segments(samples: int, seqlen: int) -> int:
    """How many of ``samples`` segments of ``seqlen`` tokens are probed."""
    return min(samples, max(1, PROBE_TOKENS // max(1, seqlen)))


def probe(
    setup: CalibrationSetup,
    budgeted: Sequence[Budgeted],
    observed: Callable[[int, int], Layer],
    read: Callable[[str], Tensor],
    scratch: Path,
    seed: int,
    note: Callable[[str], None],
) -> dict[str, Options]:
    """Bytes and loss of every choice of every budgeted layer, by name.

    Args:
        setup: whose first segments are probed.
        budgeted: in running order.
        observed: a layer that reads what all of a group read, by block and group.
        read: the float tensor that the model calls by a name.
        scratch: directory for the inputs of all blocks.
        seed: of the generator that draws tokens.
        note: is told what is going on.
    """
    count = probe_segments(*setup.segments.shape)
    own = replace(setup, segments=setup.segments[:count], spill=scratch / "states", replaced={})
    sequential = Sequential(own)
    blocks = range(len(block_list(setup.model, setup.family)))
    inside = [[one for one in budgeted if one.layer.block == index] for index in blocks]
    inputs: list[HiddenStates] = []
    predicted: dict[str, list[_Prediction]] = {}
    for index in blocks:
        note(f"probing block {index + 1}/{len(blocks)}")
        sequential.load(index)
        inputs.append(_copied(sequential.hidden, scratch / f"inputs-{index}", own))
        for group in sorted({one.layer.group or 0 for one in inside[index]}):
            hessian = sequential.observe_next(index, observed(index, group))
            members = [one for one in inside[index] if one.layer.group == group]
            predicted.update(_predict_group(members, read, hessian))
        sequential.advance(index)
        sequential.release(index)
        return_freed_memory()
    gradients = sequential.hidden
    replace_by_gradients(own, read, gradients, seed)
    table: dict[str, Options] = {}
    for index in reversed(blocks):
        sequential.load(index)
        layers = [one.layer for one in inside[index]]
        squares = backward(sequential, index, layers, inputs[index], gradients)
        for name, seen in squares.items():
            mean = seen.mean()
            table[name] = [prediction.option(mean) for prediction in predicted[name]]
        sequential.release(index)
        return_freed_memory()
    return table


def _copied(hidden: HiddenStates, directory: Path, setup: CalibrationSetup) -> HiddenStates:
    copy = HiddenStates(len(hidden), directory, setup.device)
    for batch in range(len(hidden)):
        copy[batch] = hidden[batch]
    return copy


def _predict_group(
    members: Sequence[Budgeted], read: Callable[[str], Tensor], hessian: Hessian
) -> dict[str, list[_Prediction]]:
    """Predictions for layers that read the same input, by name, in the order of their choices."""
    rows = {one.layer: _sample(one) for one in members}
    weights = {layer: _float_rows(layer, read, rows[layer]) for layer in rows}
    found: dict[tuple[Layer, Choice], _Prediction] = {}
    # Choices outside, by the order in which they solve: it decides the Hessian's factor.
    choices: dict[Choice, None] = dict.fromkeys(c for one in members for c in one.choices)
    for choice in sorted(choices, key=lambda c: (c.spec.group_axis, c.spec.group_size)):
        for one in members:
            if choice in one.choices:
                layer = one.layer
                found[layer, choice] = _predict(layer, choice, weights[layer], rows[layer], hessian)
    return {one.layer.name: [found[one.layer, choice] for choice in one.choices] for one in members}


def _sample(one: Budgeted) -> Tensor:
    """Rows that stand for a layer, the same for all of its choices."""
    out_features = one.layer.out_features
    runs = (row_run(choice.spec, out_features) for choice in one.choices)
    return sampled_rows(out_features, math.lcm(*runs))


def _float_rows(layer: Layer, read: Callable[[str], Tensor], rows: Tensor) -> Tensor:
    return layer.part_of(read(layer.stored_name)).float()[rows]


def _predict(
    layer: Layer, choice: Choice, weight: Tensor, rows: Tensor, hessian: Hessian
) -> _Prediction:
    """``weight`` holds the sampled ``rows``."""
    solver = choice.solver
    assert isinstance(solver, SpQR)
    on_device = weight.to(hessian.matrix.device)
    try:
        losses, share = solver.predict(on_device, hessian, choice.spec)
    except SolverError as error:
        raise SolverError(f"{layer.name}: {error}") from error
    nbytes = choice.expected_nbytes(layer, share)
    return _Prediction(nbytes, losses, rows.to(losses.device))
