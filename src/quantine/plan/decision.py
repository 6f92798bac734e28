"""What a plan does with one layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from quantine.families.layers import Layer
from quantine.methods.adadim import Objective
from quantine.plan.scheme import Scheme


@dataclass(frozen=True)
class Decision:
    """What a plan does with one layer, and why.

    Attributes:
        rule: the number of the rule that decided.
        choices: schemes one of which replaces ``scheme`` in the run; empty where that is settled.
        objective: of the choice; ``None`` where a budget decides.
    """

    layer: Layer
    scheme: Scheme | None
    reason: str
    rule: int | None = None
    choices: tuple[Scheme, ...] = ()
    objective: Objective | None = None

    @property
    def by_budget(self) -> bool:
        """Whether the plan's budget decides among the choices."""
        return bool(self.choices) and self.objective is None

    @property
    def needs_inputs(self) -> bool:
        """Whether the layer cannot be quantized without calibration inputs."""
        return bool(self.choices) or (self.scheme is not None and self.scheme.solver.needs_inputs)


def with_clusters(decision: Decision, sizes: tuple[int, ...]) -> Decision:
    """The decision with clusters of ``sizes``, if its layer's groups are clusters."""
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
    """A decision among the choices whose groups tile the layer; any, if none does."""
    fitting = tuple(choice.settled(layer) for choice in choices if choice.tiles(layer))
    if objective is not None and len(fitting) == 1:
        return Decision(layer, fitting[0], reason, rule)
    return Decision(layer, (fitting or choices)[0], reason, rule, fitting, objective)
