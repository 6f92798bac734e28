"""Which of its choices each matrix gets: the one with the least reconstruction loss.

AdaDim (arXiv 2309.15531, section 3.2) chooses the axis that groups run along. For the objective
``output`` matrices are rounded to nearest one after another, in running order, on the inputs that
the float block makes of what enters it: queries, keys and values are judged by the output of
attention, gate and up by that of the MLP, the last matrix of each by its own. A matrix stays as its
winner rounds it while those behind it are judged, which changes outputs only of what it is part of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from quantine.calibrate.outputs import Parts, part_of, relative_change
from quantine.calibrate.sequential import Sequential
from quantine.core.objective import DATA_FREE_CLIPS
from quantine.core.observe import Hessian
from quantine.core.qtensor import QTensor
from quantine.errors import SolverError
from quantine.families.base import Layer, block_list
from quantine.matrix import install, present_weight, solve
from quantine.methods import RTN
from quantine.plan import Decision
from quantine.prepare import Job
from quantine.scheme import Scheme

Solved = tuple[QTensor, dict[str, Tensor], dict[str, Any]]
"""As of `quantine.matrix.solve`."""


def output_losses(job: Job, sequential: Sequential, index: int) -> dict[str, list[float]]:
    """The losses of all choices that the objective ``output`` decides between, by layer.

    Args:
        sequential: at block ``index``, which has its float weights, and has them again afterwards.

    Raises:
        SolverError: names the layer.
    """
    decisions = [d for d in job.block_schemes(index) if d.objective == "output"]
    inside = f"{job.family.blocks}.{index}."
    parts_of = {
        decision.layer: part_of(job.family, decision.layer.name.removeprefix(inside))
        for decision in decisions
    }
    if not decisions:
        return {}
    block = block_list(job.model, job.family)[index]
    paths = list(dict.fromkeys(parts_of.values()))
    parts = Parts(sequential, index, block, paths, job.calibration.bfloat16)
    original = {layer: _parameter(job, layer) for layer in parts_of}
    judged, before = "", list[Tensor]()
    losses: dict[str, list[float]] = {}
    for decision in decisions:
        layer, part = decision.layer, parts_of[decision.layer]
        weight = present_weight(job.model, layer)
        if part != judged or not before:
            judged, before = part, parts.outputs(part)
        found: list[float] = []
        for choice in decision.choices:
            rounded = _rounded(layer, choice, weight)
            install(job.model, layer, rounded)
            after = parts.outputs(part)
            loss = relative_change(before, after)
            if not found or loss < min(found):
                best, of_best = rounded, after
            found.append(loss)
        install(job.model, layer, best)
        before = of_best
        losses[layer.name] = found
    for layer, parameter in original.items():
        job.model.get_submodule(layer.name).weight = parameter
    return losses


def solve_choice(
    decision: Decision, weight: Tensor, hessian: Hessian | None, losses: Mapping[str, list[float]]
) -> Solved:
    """`quantine.matrix.solve` with the choice that loses least; its report says how they compare.

    Args:
        losses: of `output_losses`; a layer that is not in it is solved with every choice.
    """

    def solved_with(choice: Scheme) -> Solved:
        return solve(replace(decision, scheme=choice), weight, hessian)

    if decision.layer.name in losses:
        found = losses[decision.layer.name]
        result = solved_with(decision.choices[found.index(min(found))])
    else:
        results = [solved_with(choice) for choice in decision.choices]
        found = [report["output_error"] for _, _, report in results]
        result = results[found.index(min(found))]
    result[2]["choice"] = _described(decision, found)
    return result


def _described(decision: Decision, losses: Sequence[float]) -> dict[str, Any]:
    """Choices and losses as the report has them; ``margin`` is what the next best loses more."""
    plain = [choice.as_dict() for choice in decision.choices]
    keys = dict.fromkeys(key for one in plain for key in one)
    differing = [key for key in keys if any(one.get(key) != plain[0].get(key) for one in plain)]
    fields = dict.fromkeys(("method", "bits", "group_size", "group_axis", *differing))
    choices = [
        {**{key: one[key] for key in fields if key in one}, "loss": loss}
        for one, loss in zip(plain, losses, strict=True)
    ]
    least, second = sorted(losses)[:2]
    margin = second / max(least, 1e-30) - 1
    return {"objective": decision.objective, "choices": choices, "margin": margin}


def _rounded(layer: Layer, choice: Scheme, weight: Tensor) -> QTensor:
    clip = choice.solver.clip if choice.solver.clip in DATA_FREE_CLIPS else "mse"
    try:
        return RTN(clip)(weight, None, choice.spec)
    except SolverError as error:
        raise SolverError(f"{layer.name}: {error}") from error


def _parameter(job: Job, layer: Layer) -> nn.Parameter:
    return job.model.get_submodule(layer.name).get_parameter("weight")
