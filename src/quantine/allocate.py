"""Which choice of a plan each searched layer gets, so that predictions change least.

`probe` runs some calibration segments through the float model once, forward and backward, and
tables what every choice would cost each layer: bytes, and divergence of the model's predictions in
nats per token. `choose` then spends a budget of bytes. It is called again for each matrix, with
what is left, so that the whole ends within the budget although sizes are only predicted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quantine.calibrate.activations import Activations
from quantine.calibrate.sensitivity import backward, replace_by_gradients
from quantine.calibrate.sequential import Sequential
from quantine.core.observe import Hessian
from quantine.core.qtensor import QTensor
from quantine.errors import PlanError, SolverError
from quantine.families.base import Layer, block_list
from quantine.formats import format_named
from quantine.formats.checkpoint import Checkpoint
from quantine.matrix import read_weight, solve
from quantine.methods.spqr import SpQR, row_run, sampled_rows
from quantine.plan import Decision
from quantine.prepare import Job
from quantine.progress import Progress, return_freed_memory
from quantine.scheme import Scheme

PROBE_TOKENS: Final = 4096
"""Calibration tokens that are enough to rank choices."""
HALVINGS: Final = 100

Array = NDArray[np.float64]
Options = list[tuple[int, float]]
"""Of one layer: bytes and loss of each of its choices."""


def probe_segments(job: Job) -> int:
    """Calibration segments that are probed."""
    samples = 0 if job.segments is None else len(job.segments)
    return min(samples, max(1, PROBE_TOKENS // max(1, job.segment_length())))


@dataclass(frozen=True)
class _Prediction:
    """What a choice would do to a layer: packed bytes, and squared errors of some outputs."""

    nbytes: int
    losses: Tensor
    rows: Tensor

    def option(self, sensitivity: Tensor) -> tuple[int, float]:
        """Bytes and loss, given the mean squared gradient of each output ``[out]``."""
        sampled = float((sensitivity[self.rows] * self.losses).sum())
        return self.nbytes, sampled / 2 * len(sensitivity) / len(self.rows)


def probe(
    job: Job, checkpoint: Checkpoint, scratch: Path, resumes: bool, progress: Progress
) -> dict[str, Options]:
    """Bytes and loss of every choice of every searched layer.

    Args:
        scratch: directory for the inputs of all blocks.
        resumes: see `Sequential`.
    """
    assert job.segments is not None
    sequential = Sequential(
        job.model,
        job.family,
        checkpoint,
        job.segments[: probe_segments(job)],
        scratch / "states",
        {},
        job.calibration.bfloat16,
        resumes,
    )
    blocks = range(len(block_list(job.model, job.family)))
    inputs: list[Activations] = []
    predicted: dict[str, list[_Prediction]] = {}
    for index in blocks:
        progress.note(f"probing block {index + 1}/{len(blocks)}")
        sequential.load(index)
        inputs.append(_copied(sequential.hidden, scratch / f"inputs-{index}"))
        predicted.update(_predict_block(job, checkpoint, sequential, index))
        sequential.advance(index)
        sequential.release(index)
        return_freed_memory()
    gradients = sequential.hidden

    def read(name: str) -> Tensor:
        stored = job.stored_name(name)
        return checkpoint.read([stored])[stored]

    tokens = replace_by_gradients(
        job.model, job.family, read, gradients, job.calibration.seed, job.calibration.bfloat16
    )
    table: dict[str, Options] = {}
    for index in reversed(blocks):
        block = sequential.load(index)
        searched = _searched(job, index)
        inside = f"{job.family.blocks}.{index}."
        paths = [decision.layer.name.removeprefix(inside) for decision in searched]
        sums = backward(sequential, index, block, paths, inputs[index], gradients)
        for decision, path in zip(searched, paths, strict=True):
            name = decision.layer.name
            sensitivity = sums[path] / tokens
            table[name] = [one.option(sensitivity) for one in predicted[name]]
        sequential.release(index)
        return_freed_memory()
    return table


def choose(table: Mapping[str, Options], nbytes: int) -> dict[str, int]:
    """The choice of each layer of ``table`` with the least sum of losses in ``nbytes`` bytes.

    Finds the price of a byte at which the layers' own best choices fit. Where even the smallest do
    not fit, those are taken.
    """
    sizes, losses = _padded(table)
    layers = np.arange(len(table))
    low, high = 0.0, math.inf
    price = 1e-9
    best = sizes.argmin(1)
    for _ in range(HALVINGS):
        tried = (losses + price * sizes).argmin(1)
        if sizes[layers, tried].sum() <= nbytes:
            best, high = tried, price
        else:
            low = price
        price = price * 8 if high == math.inf else math.sqrt(max(low, 1e-30) * high)
    return dict(zip(table, best.tolist(), strict=True))


def _padded(table: Mapping[str, Options]) -> tuple[Array, Array]:
    """Bytes and losses ``[layers, most choices]``, infinite where a layer has fewer."""
    most = max((len(options) for options in table.values()), default=1)
    padded = np.full((2, len(table), most), math.inf)
    for layer, options in enumerate(table.values()):
        padded[:, layer, : len(options)] = np.array(options).T
    return padded[0], padded[1]


class Allocation:
    """A budget, and what the layers that share it may cost.

    Args:
        job: whose plan has a budget.
        table: of `probe`.

    Raises:
        PlanError: no choices fit into the budget.
    """

    def __init__(self, job: Job, table: Mapping[str, Options]) -> None:
        assert job.plan.bits_per_weight is not None
        self._table = dict(table)
        searched = [d for d in job.decisions if d.searched]
        weights = sum(decision.layer.weights for decision in searched)
        self._left = int(weights * job.plan.bits_per_weight / 8)
        least = sum(min(nbytes for nbytes, _ in options) for options in table.values())
        if least > self._left:
            raise PlanError(
                f"plan {job.plan.name!r}: {job.plan.bits_per_weight:g} bits per weight are too "
                f"few: the smallest choices take about {least * 8 / weights:.3f} with their "
                "outliers: raise bits_per_weight, or add a choice with threshold inf"
            )

    def solve(
        self, decision: Decision, weight: Tensor, hessian: Hessian | None, progress: Progress
    ) -> tuple[QTensor, dict[str, Tensor], dict[str, Any]]:
        """`quantine.matrix.solve` with the choice that the budget has room for.

        Sizes are predicted, and the last layers cannot make up for earlier ones: where a choice
        turns out too large for what is left, the next smaller one is solved instead. In the end
        that is the smallest without outliers, whose size is known and was set aside.
        """
        name = decision.layer.name
        options = self._table[name]
        chosen = choose(self._table, self._left)[name]
        smaller = [index for index, (size, _) in enumerate(options) if size < options[chosen][0]]
        tried = [chosen, *sorted(smaller, key=lambda index: -options[index][0])]
        least = sum(
            min(size for size, _ in found) for key, found in self._table.items() if key != name
        )
        schemes = [decision.choices[index] for index in tried]
        for scheme in [*schemes, _without_outliers(schemes[-1])]:
            solved = solve(replace(decision, scheme=scheme), weight, hessian)
            if solved[2]["bytes"] + least <= self._left:
                break
            progress.note(f"{name}: {scheme.spec.bits} bits exceed what is left of the budget")
        self.spend([solved[2]])
        return solved

    def spend(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Take what solved layers really cost off the budget."""
        for report in reports:
            if self._table.pop(report["name"], None) is not None:
                self._left -= report["bytes"]


def _without_outliers(scheme: Scheme) -> Scheme:
    assert isinstance(scheme.solver, SpQR)
    return replace(scheme, solver=replace(scheme.solver, threshold=math.inf, outliers=0.0))


def _searched(job: Job, index: int) -> list[Decision]:
    return [decision for decision in job.block_schemes(index) if decision.searched]


def _copied(hidden: Activations, directory: Path) -> Activations:
    copy = Activations(len(hidden), directory)
    for batch in range(len(hidden)):
        copy[batch] = hidden[batch]
    return copy


def _predict_block(
    job: Job, checkpoint: Checkpoint, sequential: Sequential, index: int
) -> dict[str, list[_Prediction]]:
    predicted = {}
    layers = [decision.layer for decision in _searched(job, index)]
    groups = sorted({layer.group for layer in layers if layer.group is not None})
    for group in groups:
        hessian = sequential.observe_next(index, job.family.groups[group][0])
        searched = [d for d in _searched(job, index) if d.layer.group == group]
        rows = {d.layer: _sample(d) for d in searched}
        weights = {
            layer: read_weight(checkpoint, layer, f"{layer.name}.weight")[chosen]
            for layer, chosen in rows.items()
        }
        found: dict[tuple[Layer, Scheme], _Prediction] = {}
        # Choices outside, by the order in which they solve: it decides the Hessian's factor.
        choices = dict.fromkeys(choice for decision in searched for choice in decision.choices)
        for choice in sorted(choices, key=lambda c: (c.spec.group_axis, c.spec.group_size)):
            for decision in searched:
                if choice in decision.choices:
                    layer = decision.layer
                    found[layer, choice] = _predict(
                        layer, choice, weights[layer], rows[layer], hessian
                    )
        for decision in searched:
            name = decision.layer.name
            predicted[name] = [found[decision.layer, choice] for choice in decision.choices]
    return predicted


def _sample(decision: Decision) -> Tensor:
    """Rows that stand for a layer, the same for all of its choices."""
    out_features = decision.layer.out_features
    runs = (row_run(choice.spec, out_features) for choice in decision.choices)
    return sampled_rows(out_features, math.lcm(*runs))


def _predict(
    layer: Layer, choice: Scheme, weight: Tensor, rows: Tensor, hessian: Hessian
) -> _Prediction:
    """``weight`` holds the sampled ``rows``."""
    solver = choice.solver
    assert isinstance(solver, SpQR)
    try:
        losses, share = solver.predict(weight, hessian, choice.spec)
    except SolverError as error:
        raise SolverError(f"{layer.name}: {error}") from error
    nbytes = format_named(choice.format).nbytes(
        choice.spec, layer.out_features, layer.in_features, solver.stores_order(choice.spec), share
    )
    return _Prediction(nbytes, losses, rows)
