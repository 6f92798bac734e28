"""AdaDim (arXiv 2309.15531): each matrix gets the one of several choices that loses least.

The paper (section 3.2) chooses the axis that groups run along. For the objective ``output`` matrices
are rounded to nearest one after another, in running order, on the inputs that the float block makes
of what enters it: queries, keys and values are judged by the output of attention, gate and up by
that of the MLP, the last matrix of each by its own. A matrix stays as its winner rounds it while
those behind it are judged, which changes outputs only of what it is part of.
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
from quantine.statistics.losses import relative_loss

ADADIM: Final = "adadim"
"""The name that plans use."""
Objective = Literal["output", "hessian"]
OBJECTIVES: Final[tuple[Objective, ...]] = ("output", "hessian")
"""What is compared.

``"output"``: rounded to nearest, how much a choice changes the output of what the matrix is part
of, see `output_losses`. ``"hessian"``: solved, how much it changes the matrix's own output,
``tr(D H D.T)``.
"""


class Choice(Protocol):
    """One way to quantize a matrix."""

    @property
    def solver(self) -> Solver:
        """Rounds the matrix."""
        ...

    @property
    def spec(self) -> QuantSpec:
        """What is asked of it."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Everything about the choice, as plain values."""
        ...


SomeChoice = TypeVar("SomeChoice", bound=Choice)


@dataclass(frozen=True)
class AdaDim(Generic[SomeChoice]):
    """One of several choices for each matrix: the one with the least reconstruction loss.

    Choices may differ in anything; where they take different bytes, the largest mostly wins: use a
    budget.

    Attributes:
        choices: at least one; of equals the first is taken.
        objective: what is compared, see `OBJECTIVES`.
    """

    choices: tuple[SomeChoice, ...]
    objective: Objective = "output"

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        if not self.choices:
            raise PlanError("choices must not be empty")

    def as_dict(self) -> dict[str, Any]:
        """Plain values; `quantine.plan.scheme_parsing.adadim_from` inverts it."""
        choices = [choice.as_dict() for choice in self.choices]
        return {"method": ADADIM, "objective": self.objective, "choices": choices}


@dataclass(frozen=True)
class Candidate:
    """A matrix whose choices are judged by outputs.

    Attributes:
        name: of its layer.
        weight: ``[out, in]`` float32.
        choices: at least one.
        judged_by: the module whose output counts, as `output_losses` is told about it.
    """

    name: str
    weight: Tensor
    choices: Sequence[Choice]
    judged_by: str


def output_losses(
    candidates: Sequence[Candidate],
    outputs: Callable[[str], list[Tensor]],
    install: Callable[[str, QTensor], None],
) -> dict[str, list[float]]:
    """The losses of all choices of ``candidates``, by name.

    Args:
        candidates: of one block, in running order.
        outputs: what a module puts out with the weights of now, a tensor for each batch.
        install: gives a layer other weights; every candidate is left with those of its winner.

    Raises:
        SolverError: names the layer.
    """
    judged_by, before = "", list[Tensor]()
    losses: dict[str, list[float]] = {}
    for candidate in candidates:
        if candidate.judged_by != judged_by or not before:
            judged_by, before = candidate.judged_by, outputs(candidate.judged_by)
        found: list[float] = []
        for choice in candidate.choices:
            rounded = _rounded(candidate, choice)
            install(candidate.name, rounded)
            after = outputs(judged_by)
            loss = relative_loss(before, after)
            if not found or loss < min(found):
                best, of_best = rounded, after
            found.append(loss)
        install(candidate.name, best)
        before = of_best
        losses[candidate.name] = found
    return losses


def cheapest(losses: Sequence[float]) -> int:
    """The choice with the least loss; the first of equals."""
    return losses.index(min(losses))


def describe_choice(
    objective: Objective | None, choices: Sequence[Choice], losses: Sequence[float]
) -> dict[str, Any]:
    """Choices and losses as the report has them; ``margin`` is what the next best loses more."""
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
    clip = choice.solver.clip if choice.solver.clip in DATA_FREE_CLIPS else "mse"
    try:
        return RTN(clip)(candidate.weight, None, choice.spec)
    except SolverError as error:
        raise SolverError(f"{candidate.name}: {error}") from error
