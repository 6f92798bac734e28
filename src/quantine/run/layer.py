"""One matrix of a run: solved, perhaps adjusted with its block, then packed and reported.

`solve` makes a `Solved`. `quantine.run.block` lets an adjustment change those of a block.
`packed_tensors` and `Solved.report` are what the output directory gets.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.stage_times import StageTimes
from quantine.errors import FormatError, SolverError
from quantine.families.layers import Layer
from quantine.methods.adadim import cheapest, describe_choice
from quantine.plan.decision import Decision
from quantine.plan.scheme import Scheme
from quantine.ranks.ranks import Ranks
from quantine.statistics.hessian import Hessian
from quantine.statistics.losses import RelativeLoss
from quantine.statistics.sensitivity_map import sensitivity_map


@dataclass(frozen=True)
class Solved:
    """A quantized matrix in the form that its packed layout can hold.

    Attributes:
        decision: the decision about the layer, with the scheme that was used.
        packed: the tensors of the layout, by their names in it.
        qtensor: the matrix that ``packed`` stands for; where a layout rounds, the rounded one.
        output_error: squared error of the layer's output relative to the squared output of the
            float layer, on the calibration inputs; ``None`` without any.
        weight_error: squared error of the weights relative to their squares.
        damp: damping with which the Hessian was factored; ``None`` if none was.
        choice: choices and their losses, see `quantine.methods.adadim.describe_choice`; ``None`` if
            there was no choice.
        seconds: time that solving took.
        tokens: number of calibration tokens that chose the expert; ``None`` outside of experts.
        borrowed: how many more it borrowed of others, see `quantine.calibrate.expert_tokens`.
        made_up: share of the errors before it that the weight was changed to take off, on text that
            judges; errors are then those of the changed weight. ``None`` where none is.
    """

    decision: Decision
    packed: dict[str, Tensor]
    qtensor: QTensor
    output_error: float | None
    weight_error: float
    damp: float | None
    choice: dict[str, Any] | None
    seconds: float
    tokens: int | None = None
    borrowed: int = 0
    made_up: float | None = None

    @property
    def layer(self) -> Layer:
        """The layer whose matrix this is."""
        return self.decision.layer

    @property
    def nbytes(self) -> int:
        """Size of the packed tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.packed.values())

    def adjusted(self, qtensor: QTensor, weight: Tensor, hessian: Hessian | None) -> Solved:
        """The result for the same layer and scheme with another quantized matrix.

        Errors and packed tensors are computed anew.

        Args:
            qtensor: the changed matrix, on a grid of the same spec.
            weight: what it was to become, ``[out, in]`` float32, as given to `solve`.
            hessian: statistics of the input, as given to `solve`.

        Raises:
            FormatError: the layout cannot hold the matrix; the message names the layer.
        """
        changed = held(self.decision, qtensor, weight, hessian)
        return replace(
            changed,
            damp=self.damp,
            choice=self.choice,
            seconds=self.seconds,
            made_up=self.made_up,
        )

    def report(self) -> dict[str, Any]:
        """The entry of the layer in ``quantine_report.json``, as plain values."""
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
        if self.tokens is not None:
            entry |= {"tokens": self.tokens, "tokens_borrowed": self.borrowed}
        if self.made_up is not None:
            entry["made_up"] = self.made_up
        return entry if self.choice is None else {**entry, "choice": self.choice}


def solve(decision: Decision, weight: Tensor, hessian: Hessian | None, times: StageTimes) -> Solved:
    """Quantize one matrix with the scheme of its decision.

    Args:
        decision: the decision about the layer, with a scheme.
        weight: the float weight, ``[out, in]`` float32.
        hessian: statistics of its input; ``None`` without calibration.
        times: is told what the stages ``solving`` and ``packing`` take.

    Raises:
        SolverError: the matrix cannot be solved; the message names the layer.
        FormatError: the layout cannot hold the result; the message names the layer.
    """
    scheme = decision.scheme
    assert scheme is not None
    started = time.perf_counter()
    try:
        with times.stage("solving"):
            qtensor = scheme.solver(weight, hessian, scheme.spec)
    except SolverError as error:
        raise SolverError(f"{decision.layer.name}: {error}") from error
    with times.stage("packing"):
        solved = held(decision, qtensor, weight, hessian)
    damp = hessian.damp_used if hessian and scheme.solver.needs_inputs else None
    return replace(solved, damp=damp, seconds=time.perf_counter() - started)


def solve_choice(
    decision: Decision,
    weight: Tensor,
    hessian: Hessian | None,
    losses: Mapping[str, list[RelativeLoss]],
    times: StageTimes,
) -> Solved:
    """Quantize one matrix with the choice that loses least.

    Args:
        decision: the decision about the layer, with choices.
        weight: the float weight, ``[out, in]`` float32.
        hessian: statistics of its input.
        losses: losses of the choices by layer name, from `quantine.methods.adadim.output_losses`. A
            layer that is missing there is solved with every choice, and output errors are compared.
        times: as for `solve`.

    Raises:
        SolverError: the matrix cannot be solved; the message names the layer.
        FormatError: the layout cannot hold the result; the message names the layer.
    """

    def solved_with(number: int) -> Solved:
        return solve(replace(decision, scheme=decision.choices[number]), weight, hessian, times)

    if decision.layer.name in losses:
        found = [loss.value for loss in losses[decision.layer.name]]
        solved = solved_with(cheapest(found))
    else:
        assert hessian is not None, "choices are compared on calibration inputs"
        # Outputs that make up for each other add to the error of outputs, which does not see why.
        coupling, hessian.coupling = hessian.coupling, None
        every = [solved_with(number) for number in range(len(decision.choices))]
        found = [one.output_error for one in every if one.output_error is not None]
        assert len(found) == len(every), "there were tokens"
        hessian.coupling = coupling
        best = cheapest(found)
        solved = every[best] if coupling is None else solved_with(best)
    choice = describe_choice(decision.objective, decision.choices, found)
    return replace(solved, choice=choice)


def known_to_all(
    ranks: Ranks,
    owner: int,
    decision: Decision,
    found: tuple[Solved, dict[str, Tensor]] | None,
    device: torch.device,
) -> tuple[Solved, dict[str, Tensor]]:
    """A result that one rank has, on every rank; packed tensors are what is sent.

    Args:
        ranks: the processes that share the work.
        owner: the rank that has it.
        decision: the decision about the layer.
        found: the result and its tensors for pictures, on the owner.
        device: where this rank computes.
    """
    if ranks.count == 1:
        assert found is not None
        return found

    def message() -> tuple[Scheme | None, dict[str, Any], dict[str, Tensor]]:
        assert found is not None
        solved, maps = found
        plain = {field.name: getattr(solved, field.name) for field in fields(solved)}
        del plain["decision"], plain["qtensor"]  # which the others have, and can make
        plain["packed"] = {key: value.cpu() for key, value in solved.packed.items()}
        return solved.decision.scheme, plain, maps

    scheme, plain, maps = ranks.of_rank(owner, message)
    if found is not None:
        return found
    assert scheme is not None
    packed = {key: value.to(device) for key, value in plain.pop("packed").items()}
    qtensor = scheme.layout.unpack(packed, scheme.spec, decision.layer.in_features)
    decision = replace(decision, scheme=scheme)
    return Solved(decision=decision, packed=packed, qtensor=qtensor, **plain), maps


def packed_tensors(solved: Solved) -> dict[str, Tensor]:
    """The packed tensors by their full names, on the CPU, from where files are written."""
    return {f"{solved.layer.name}.{key}": value.cpu() for key, value in solved.packed.items()}


def unpack(decision: Decision, tensors: Mapping[str, Tensor]) -> QTensor:
    """The quantized matrix of a layer from the packed tensors.

    Args:
        decision: the decision about the layer, with the scheme that was used.
        tensors: packed tensors by full name, at least those of the layer.
    """
    layer, scheme = decision.layer, decision.scheme
    assert scheme is not None
    names = {key: f"{layer.name}.{key}" for key in scheme.layout.tensor_names}
    packed = {key: tensors[name] for key, name in names.items() if name in tensors}
    return scheme.layout.unpack(packed, scheme.spec, layer.in_features)


def sensitivity(solved: Solved, weight: Tensor, hessian: Hessian | None) -> dict[str, Tensor]:
    """The sensitivity map of the matrix, under the layer's name.

    Empty for layers whose solver did not use the inverse Hessian.

    Args:
        solved: the result of the layer.
        weight: the float weight, ``[out, in]`` float32.
        hessian: statistics of its input; ``None`` without calibration.
    """
    scheme = solved.decision.scheme
    assert scheme is not None
    used = hessian is not None and scheme.solver.needs_inputs
    inverse = hessian.inverse_diagonal() if hessian and used else None
    if inverse is None:
        return {}
    return {solved.layer.name: sensitivity_map(weight, solved.qtensor, inverse).cpu()}


def held(decision: Decision, qtensor: QTensor, weight: Tensor, hessian: Hessian | None) -> Solved:
    """Pack ``qtensor``, and measure the errors of what the layout really holds.

    Args:
        decision: the decision about the layer, with the scheme that was used.
        qtensor: the matrix.
        weight: the float weight, ``[out, in]`` float32.
        hessian: statistics of its input; without them, there is no error of outputs.

    Raises:
        FormatError: the layout cannot hold the matrix; the message names the layer.
    """
    scheme = decision.scheme
    assert scheme is not None
    try:
        packed = scheme.layout.pack(qtensor)
    except FormatError as error:
        raise FormatError(f"{decision.layer.name}: {error}") from error
    stored = scheme.layout.unpack(packed, scheme.spec, decision.layer.in_features)
    delta = stored.dequantize().sub_(weight)
    output_error = None
    if hessian is not None and hessian.tokens:
        energy = hessian.error_energy(delta)
        output_error = energy / max(hessian.error_energy(weight), 1e-30)
    weight_error = float(delta.square().sum() / weight.square().sum().clamp(min=1e-30))
    solved = Solved(decision, packed, stored, output_error, weight_error, None, None, 0.0)
    if hessian is None or not decision.layer.experts:
        return solved
    own = hessian.tokens - hessian.borrowed
    return replace(solved, tokens=own, borrowed=hessian.borrowed)
