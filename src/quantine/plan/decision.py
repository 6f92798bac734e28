"""`Decision`: what a plan does with one layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from quantine.families.layers import Layer
from quantine.methods.adadim import ADADIM, Objective
from quantine.plan.rules import BY_BUDGET
from quantine.plan.scheme import KEEP, Scheme


@dataclass(frozen=True)
class Decision:
    """What a plan does with one layer, and why.

    Attributes:
        layer: the layer.
        scheme: how it is quantized; ``None`` keeps it in 16 bit. Where there are choices, one of
            them.
        reason: the deciding rule in words, for reports and errors.
        rule: number of the deciding rule, from 1; ``None`` if no rule matches.
        choices: schemes of which the run takes one instead of ``scheme``; empty where ``scheme`` is
            final.
        objective: the loss by which choices are compared, see `quantine.methods.adadim.OBJECTIVES`;
            ``None`` where the plan's budget of bits decides.
    """

    layer: Layer
    scheme: Scheme | None
    reason: str
    rule: int | None = None
    choices: tuple[Scheme, ...] = ()
    objective: Objective | None = None

    @property
    def by_budget(self) -> bool:
        """Whether the plan's budget of bits decides among the choices."""
        return bool(self.choices) and self.objective is None

    @property
    def method(self) -> str:
        """What plans call the way in which the layer's numbers are found."""
        if self.choices:
            return BY_BUDGET if self.by_budget else ADADIM
        return KEEP if self.scheme is None else self.scheme.method

    @property
    def needs_inputs(self) -> bool:
        """Whether the layer can be quantized only with calibration inputs."""
        return bool(self.choices) or (self.scheme is not None and self.scheme.solver.needs_inputs)


def with_clusters(decision: Decision, sizes: tuple[int, ...]) -> Decision:
    """The decision with known cluster sizes; unchanged if the layer's groups are not clusters.

    Args:
        decision: about a layer.
        sizes: number of inputs of each cluster.
    """
    scheme = decision.scheme
    if scheme is None or not scheme.spec.clustered:
        return decision
    spec = dataclasses.replace(scheme.spec, cluster_sizes=sizes)
    return dataclasses.replace(decision, scheme=dataclasses.replace(scheme, spec=spec))


def decide_later(
    layer: Layer,
    choices: tuple[Scheme, ...],
    reason: str,
    rule: int,
    objective: Objective | None = None,
) -> Decision:
    """A decision that leaves the choice of the scheme to the run.

    Choices whose groups do not divide the layer are left out. With an objective and only one choice
    left, that is final. With none left, the first choice is set so that
    `quantine.plan.checks.check_groups` refuses it.

    Args:
        layer: the layer.
        choices: schemes to choose from, at least one.
        reason: the deciding rule in words.
        rule: number of the deciding rule, from 1.
        objective: the loss by which choices are compared; ``None`` for a budget of bits.

    Raises:
        PlanError: ``average_bits`` of a choice cannot be met on this layer.
    """
    fitting = tuple(choice.settled(layer) for choice in choices if choice.tiles(layer))
    if objective is not None and len(fitting) == 1:
        return Decision(layer, fitting[0], reason, rule)
    return Decision(layer, (fitting or choices)[0], reason, rule, fitting, objective)
