"""A plan with other parameters for some layers, which are to be quantized again."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from quantine.errors import PlanError, shown
from quantine.plan.decision import Decision
from quantine.plan.plan import Plan
from quantine.plan.rules import Rule, rule_from


def redone_layers(decisions: Sequence[Decision], pattern: str) -> list[str]:
    """Names of the quantized layers that ``pattern`` matches, in running order.

    Args:
        decisions: what a plan does.
        pattern: see `quantine.plan.rules.Rule`.

    Raises:
        PlanError: it matches none, or one about which a budget decides.
    """
    rule = Rule(pattern)
    found = [d for d in decisions if d.scheme is not None and rule.matches(d.layer)]
    if not found:
        raise PlanError(f"--redo {shown(pattern)} matches no layer that this plan quantizes")
    for decision in found:
        if decision.by_budget:
            raise PlanError(
                f"{decision.layer.name} got its scheme from a budget, which all layers share: "
                "quantize again with another plan"
            )
    return [decision.layer.name for decision in found]


def plan_for_redo(
    plan: Plan,
    decisions: Sequence[Decision],
    names: Collection[str],
    changes: Mapping[str, Any],
) -> Plan:
    """``plan`` with ``changes`` to the rules that decide about some layers.

    Args:
        plan: the plan of the finished run.
        decisions: what it does.
        names: names of layers that it quantizes, from `redone_layers`.
        changes: parameters by name, such as ``{"damp": 0.05}``.

    Returns:
        The plan, with a rule of its own for each of the layers before all others.

    Raises:
        PlanError: a parameter is unknown or has a value that is not allowed.
    """
    if "match" in changes:
        raise PlanError("--set changes parameters, not which layers: --redo PATTERN says that")
    own = []
    for decision in decisions:
        if decision.layer.name in names:
            assert decision.rule is not None
            fields = plan.rules[decision.rule - 1].as_dict()
            value = {**fields, **changes, "match": decision.layer.name}
            own.append(rule_from(value, f"--set for {decision.layer.name}"))
    # A rule that decides about no other layer would match none, which plans refuse.
    untouched = [
        rule
        for number, rule in enumerate(plan.rules, 1)
        if any(d.rule == number and d.layer.name not in names for d in decisions)
    ]
    return dataclasses.replace(plan, rules=(*own, *untouched))
