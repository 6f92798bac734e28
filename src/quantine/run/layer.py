"""One matrix of a run, in three steps: solve it, adjust it with its block, pack it and report.

`solve` makes a `Solved`, `quantine.run.block` lets an `Adjustment` change those of a block, and
`packed_tensors` and `Solved.report` are what the output gets.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.errors import FormatError, SolverError
from quantine.families.layers import Layer
from quantine.methods.adadim import cheapest, describe_choice
from quantine.plan.decision import Decision
from quantine.statistics.hessian import Hessian
from quantine.statistics.sensitivity_map import sensitivity_map


@dataclass(frozen=True)
class Solved:
    """A quantized matrix, as the layout of its scheme holds it.

    Attributes:
        decision: about the layer; its scheme is the one that was used.
        packed: the tensors of the layout, by their names in it.
        qtensor: what they mean: what is stored is what runs, also where a layout rounds.
        output_error: squared output error relative to the float layer's squared output, on the
            calibration inputs; ``None`` without any.
        weight_error: squared error of the weights relative to their squares.
        damp: that was used to factor the Hessian; ``None`` where none was used.
        choice: how the choices compare among which the scheme was taken; ``None`` without choice.
        seconds: that solving took.
    """

    decision: Decision
    packed: dict[str, Tensor]
    qtensor: QTensor
    output_error: float | None
    weight_error: float
    damp: float | None
    choice: dict[str, Any] | None
    seconds: float

    @property
    def layer(self) -> Layer:
        """Which matrix it is."""
        return self.decision.layer

    @property
    def nbytes(self) -> int:
        """Bytes of the packed tensors."""
        return sum(tensor.nbytes for tensor in self.packed.values())

    def adjusted(self, qtensor: QTensor, weight: Tensor, hessian: Hessian | None) -> Solved:
        """Another result for the same layer and scheme, with errors of its own.

        Args:
            qtensor: of the same spec.
            weight: the float weight, ``[out, in]`` float32.
            hessian: statistics of the input, as `solve` had them.

        Raises:
            FormatError: names the layer; the layout cannot hold the result.
        """
        held = _held(self.decision, qtensor, weight, hessian)
        return replace(held, damp=self.damp, choice=self.choice, seconds=self.seconds)

    def report(self) -> dict[str, Any]:
        """The layer's entry in ``quantine_report.json``."""
        layer, scheme, nbytes = self.layer, self.decision.scheme, self.nbytes
        assert scheme is not None
        outliers = self.qtensor.outliers
        entry = {
            "name": layer.name,
            "scheme": scheme.as_dict(),
            "shape": [layer.out_features, layer.in_features],
            "weights": layer.weights,
            "bytes": nbytes,
            "bits_per_weight": nbytes * 8 / layer.weights,
            "outliers": 0 if outliers is None else outliers.entries,
            "output_error": self.output_error,
            "weight_error": self.weight_error,
            "damp": self.damp,
            "seconds": round(self.seconds, 3),
        }
        return entry if self.choice is None else {**entry, "choice": self.choice}


def solve(decision: Decision, weight: Tensor, hessian: Hessian | None) -> Solved:
    """Quantize one matrix.

    Args:
        weight: ``[out, in]`` float32.
        hessian: statistics of its input, if any were taken.

    Raises:
        SolverError: names the layer.
        FormatError: likewise; the layout cannot hold the result.
    """
    scheme = decision.scheme
    assert scheme is not None
    started = time.perf_counter()
    try:
        qtensor = scheme.solver(weight, hessian, scheme.spec)
    except SolverError as error:
        raise SolverError(f"{decision.layer.name}: {error}") from error
    held = _held(decision, qtensor, weight, hessian)
    damp = hessian.damp_used if hessian and scheme.solver.needs_inputs else None
    return replace(held, damp=damp, seconds=time.perf_counter() - started)


def solve_choice(
    decision: Decision, weight: Tensor, hessian: Hessian | None, losses: Mapping[str, list[float]]
) -> Solved:
    """`solve` with the choice that loses least.

    Args:
        losses: of `quantine.methods.adadim.output_losses`; a layer that is not in it is solved with
            every choice.
    """

    def solved_with(number: int) -> Solved:
        return solve(replace(decision, scheme=decision.choices[number]), weight, hessian)

    if decision.layer.name in losses:
        found = losses[decision.layer.name]
        solved = solved_with(cheapest(found))
    else:
        every = [solved_with(number) for number in range(len(decision.choices))]
        found = [one.output_error for one in every if one.output_error is not None]
        assert len(found) == len(every), "choices are compared on calibration inputs"
        solved = every[cheapest(found)]
    choice = describe_choice(decision.objective, decision.choices, found)
    return replace(solved, choice=choice)


def packed_tensors(solved: Solved) -> dict[str, Tensor]:
    """The packed tensors by full name, on the CPU, where files are written from."""
    return {f"{solved.layer.name}.{key}": value.cpu() for key, value in solved.packed.items()}


def unpack(decision: Decision, tensors: Mapping[str, Tensor]) -> QTensor:
    """The result stored among ``tensors``, which go by full names."""
    layer, scheme = decision.layer, decision.scheme
    assert scheme is not None
    names = {key: f"{layer.name}.{key}" for key in scheme.layout.tensor_names}
    packed = {key: tensors[name] for key, name in names.items() if name in tensors}
    return scheme.layout.unpack(packed, scheme.spec, layer.in_features)


def sensitivity(solved: Solved, weight: Tensor, hessian: Hessian | None) -> dict[str, Tensor]:
    """The map of how much each weight matters, by the layer's name.

    Nothing for layers whose solver did not use the inverse of ``hessian``.
    """
    scheme = solved.decision.scheme
    assert scheme is not None
    used = hessian is not None and scheme.solver.needs_inputs
    inverse = hessian.inverse_diagonal() if hessian and used else None
    if inverse is None:
        return {}
    return {solved.layer.name: sensitivity_map(weight, solved.qtensor, inverse).cpu()}


def _held(decision: Decision, qtensor: QTensor, weight: Tensor, hessian: Hessian | None) -> Solved:
    """``qtensor`` as the layout holds it, and its errors."""
    scheme = decision.scheme
    assert scheme is not None
    try:
        packed = scheme.layout.pack(qtensor)
    except FormatError as error:
        raise FormatError(f"{decision.layer.name}: {error}") from error
    held = scheme.layout.unpack(packed, scheme.spec, decision.layer.in_features)
    delta = held.dequantize().sub_(weight)
    output_error = None
    if hessian is not None and hessian.tokens:
        energy = hessian.error_energy(delta)
        output_error = energy / max(hessian.error_energy(weight), 1e-30)
    weight_error = float(delta.square().sum() / weight.square().sum().clamp(min=1e-30))
    return Solved(decision, packed, held, output_error, weight_error, None, None, 0.0)
