"""AdaDim (arXiv 2309.15531): each matrix gets the choice out of several that loses least.

The paper (section 3.2) chooses the axis that groups run along. For the objective ``output``,
matrices are rounded to nearest one after another, in running order, on the inputs that the float
block computes. Queries, keys and values are judged by the output of attention, gate and up by that
of the MLP, and the last matrix of each by its own output. A matrix stays rounded as by its best
choice while those behind it are judged, which matters only to those judged by the same output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec, check_choice
from quantine.errors import PlanError, SolverError
from quantine.kernels.fit.grid_cost import DATA_FREE_CLIPS
from quantine.methods.rtn import RTN
from quantine.methods.solver import Solver
from quantine.statistics.losses import RelativeLoss, relative_loss

ADADIM: Final = "adadim"
"""Name of AdaDim in plans."""
Objective = Literal["output", "hessian"]
"""Name of a loss by which choices are compared, see `OBJECTIVES`."""
OBJECTIVES: Final[tuple[Objective, ...]] = ("output", "hessian")
"""The losses by which choices for a matrix can be compared.

``"output"``: the matrix is rounded to nearest, and the loss is the relative change of the output of
the module it belongs to, see `output_losses`. ``"hessian"``: the matrix is solved by the choice's
own method, and the loss is the change of the matrix's own output, ``tr(D H D.T)`` with the weight
change ``D`` and the Hessian ``H``.
"""


class Choice(Protocol):
    """One way to quantize a matrix: a method and a grid."""

    @property
    def solver(self) -> Solver:
        """The method, with its parameters."""
        ...

    @property
    def spec(self) -> QuantSpec:
        """The grid to quantize on."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """The choice with all its parameters, as plain values for reports and plans."""
        ...


SomeChoice = TypeVar("SomeChoice", bound=Choice)
"""The type of the choices of an `AdaDim`."""


@dataclass(frozen=True)
class AdaDim(Generic[SomeChoice]):
    """Several choices for a matrix, of which the one with the least loss is taken.

    Choices may differ in anything. Where they take different numbers of bytes, the largest mostly
    wins: use a budget instead.

    Attributes:
        choices: at least one; among equal losses the first is taken.
        objective: the loss by which choices are compared, see `OBJECTIVES`.

    Raises:
        PlanError: there are no choices, or the objective is unknown.
    """

    choices: tuple[SomeChoice, ...]
    objective: Objective = "output"

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        if not self.choices:
            raise PlanError("choices must not be empty")

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values; `quantine.plan.scheme_parsing.adadim_from` inverts it."""
        choices = [choice.as_dict() for choice in self.choices]
        return {"method": ADADIM, "objective": self.objective, "choices": choices}


@dataclass(frozen=True)
class Candidate:
    """A matrix whose choices are judged by the change of an output.

    Attributes:
        name: name of its layer.
        weight: ``[out, in]`` float32.
        choices: the ways to quantize it, at least one.
        judged_by: path of the module whose output is compared, as `output_losses` passes it on.
    """

    name: str
    weight: Tensor
    choices: Sequence[Choice]
    judged_by: str


def output_losses(
    candidates: Sequence[Candidate],
    outputs: Callable[[str], list[Tensor]],
    install: Callable[[str, QTensor], None],
) -> dict[str, list[RelativeLoss]]:
    """The loss of every choice of every candidate: the relative change of a module's output.

    Args:
        candidates: matrices of one block, in running order.
        outputs: computes the outputs of the module at a path with the present weights, one tensor
            per batch.
        install: replaces the weights of the layer with the given name. In the end every candidate
            has the weights of its best choice.

    Returns:
        By layer name, one loss per choice: the sum of squared changes over the sum of squares.

    Raises:
        SolverError: a candidate cannot be rounded; the message names the layer.
    """
    judged_by, before = "", list[Tensor]()
    losses: dict[str, list[RelativeLoss]] = {}
    for candidate in candidates:
        if candidate.judged_by != judged_by or not before:
            judged_by, before = candidate.judged_by, outputs(candidate.judged_by)
        found: list[RelativeLoss] = []
        for choice in candidate.choices:
            rounded = _rounded(candidate, choice)
            install(candidate.name, rounded)
            after = outputs(judged_by)
            loss = relative_loss(before, after)
            if all(loss.value < other.value for other in found):
                best, of_best = rounded, after
            found.append(loss)
        install(candidate.name, best)
        before = of_best
        losses[candidate.name] = found
    return losses


def cheapest(losses: Sequence[float]) -> int:
    """The index of the least of ``losses``, the first of equals."""
    return losses.index(min(losses))


def describe_choice(
    objective: Objective | None, choices: Sequence[Choice], losses: Sequence[float]
) -> dict[str, Any]:
    """The choices of a layer and their losses, as the report states them.

    Args:
        objective: the loss that was compared.
        choices: at least two.
        losses: one per choice.

    Returns:
        Plain values: the objective; for each choice its loss, its main fields and those in which
        choices differ; and ``margin``, by how much the second least loss exceeds the least,
        relative to it.
    """
    plain = [choice.as_dict() for choice in choices]
    keys = dict.fromkeys(key for one in plain for key in one)
    differing = [key for key in keys if any(one.get(key) != plain[0].get(key) for one in plain)]
    fields = dict.fromkeys(("method", "bits", "group_size", "group_axis", *differing))
    described = [
        {**{key: one[key] for key in fields if key in one}, "loss": loss}
        for one, loss in zip(plain, losses, strict=True)
    ]
    least, second = sorted(losses)[:2]
    margin = second / max(least, 1e-30) - 1
    return {"objective": objective, "choices": described, "margin": margin}


def _rounded(candidate: Candidate, choice: Choice) -> QTensor:
    """Round to nearest on the grid of ``choice``, with its clip unless that needs a Hessian."""
    clip = choice.solver.clip if choice.solver.clip in DATA_FREE_CLIPS else "mse"
    try:
        return RTN(clip)(candidate.weight, None, choice.spec)
    except SolverError as error:
        raise SolverError(f"{candidate.name}: {error}") from error
