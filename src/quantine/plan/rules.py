"""A rule of a plan: which layers it matches, and how they are quantized."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantine.errors import PlanError, shown
from quantine.families.layers import Layer
from quantine.methods.adadim import ADADIM, AdaDim
from quantine.plan.scheme import KEEP, Scheme
from quantine.plan.scheme_parsing import adadim_from, scheme_from

BY_BUDGET: Final = "search"
"""Name of the method by which the plan's budget chooses a scheme for each layer of a rule."""
SETS: Final = {"@blocks": "block", "@embedding": "embedding", "@head": "head"}
"""Patterns that stand for every matrix of one role, with that role."""


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches ``match`` get ``scheme``.

    Attributes:
        match: a shell pattern on full layer names, where ``*`` also crosses dots; or ``@blocks``
            (every matrix inside a decoder block), ``@head`` or ``@embedding``.
        scheme: how the layers are quantized; ``None`` keeps them in 16 bit.
        by_budget: whether each layer gets one of the plan's ``choices`` instead.

    Raises:
        PlanError: ``match`` names an unknown set of layers.
    """

    match: str
    scheme: Scheme | AdaDim[Scheme] | None = None
    by_budget: bool = False

    def __post_init__(self) -> None:
        if self.match.startswith("@") and self.match not in SETS:
            raise PlanError(f"unknown set {shown(self.match)} (known: {', '.join(SETS)})")

    def matches(self, layer: Layer) -> bool:
        """Whether the rule applies to ``layer``."""
        if self.match in SETS:
            return layer.role == SETS[self.match]
        return fnmatch.fnmatchcase(layer.name, self.match)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values, with every default spelled out; `rule_from` inverts it."""
        unsettled = {"method": BY_BUDGET if self.by_budget else KEEP}
        return {"match": self.match, **(self.scheme.as_dict() if self.scheme else unsettled)}


def rule_from(value: Any, where: str) -> Rule:
    """A rule from plain values.

    Args:
        value: a mapping with ``match``, ``method``, and fields of the scheme.
        where: the place of the rule in the plan, named in errors.

    Raises:
        PlanError: the rule is malformed; the message says what would be right.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("match"), str):
        raise PlanError(f"{where} must be a mapping with a `match` pattern")
    match, fields = value["match"], {k: v for k, v in value.items() if k != "match"}
    if fields.get("method") == ADADIM:
        return Rule(match, adadim_from(fields, where))
    if fields.get("method") != BY_BUDGET:
        return Rule(match, scheme_from(fields, where))
    if len(fields) > 1:
        raise PlanError(f"{where}: method {BY_BUDGET!r} takes no parameters")
    return Rule(match, by_budget=True)
