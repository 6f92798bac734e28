"""Plans: which matrix is quantized how. Rules in, one checked scheme per layer out."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_type_hints

import yaml

from quantine.core.spec import QuantSpec, nearest_group_sizes
from quantine.errors import PlanError
from quantine.families.base import Layer
from quantine.formats import FORMATS, format_named
from quantine.methods import METHODS, Solver

KEEP: Final = "keep"
"""The method of a rule that leaves its layers in 16 bit."""
INFINITE: Final = "inf"
"""How plans write an infinite number."""
SETS: Final = {"@blocks": "block", "@embedding": "embedding", "@head": "head"}
"""Patterns that stand for every matrix of one role."""


@dataclass(frozen=True)
class Scheme:
    """How one matrix is quantized: solver, weight request, and packed layout."""

    solver: Solver
    spec: QuantSpec
    format: str = "dense"

    @property
    def method(self) -> str:
        """The solver's name in `METHODS`."""
        return next(name for name, kind in METHODS.items() if type(self.solver) is kind)

    def as_dict(self) -> dict[str, Any]:
        """Everything about the scheme, as plain values; `scheme_from` inverts it."""
        return {
            "method": self.method,
            **dataclasses.asdict(self.spec),
            **{name: _plain(item) for name, item in dataclasses.asdict(self.solver).items()},  # type: ignore[call-overload]
            "format": self.format,
        }

    def nbytes(self, layer: Layer) -> int:
        """Packed bytes of ``layer`` under this scheme."""
        return format_named(self.format).nbytes(
            self.spec, layer.out_features, layer.in_features, self.solver.stores_order
        )


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches ``match`` get ``scheme``; ``None`` keeps them in 16 bit.

    Attributes:
        match: a shell pattern on full layer names, where ``*`` also crosses dots; or
            ``@blocks`` (every matrix inside a decoder block), ``@head``, ``@embedding``.
        scheme: what to do with them.
    """

    match: str
    scheme: Scheme | None

    def __post_init__(self) -> None:
        if self.match.startswith("@") and self.match not in SETS:
            raise PlanError(f"unknown set {self.match!r} (known: {', '.join(SETS)})")

    def matches(self, layer: Layer) -> bool:
        """Whether the rule speaks of ``layer``."""
        if self.match in SETS:
            return layer.role == SETS[self.match]
        return fnmatch.fnmatchcase(layer.name, self.match)


@dataclass(frozen=True)
class Decision:
    """What a plan does with one layer, and why; ``rule`` is the number of the rule that decided."""

    layer: Layer
    scheme: Scheme | None
    reason: str
    rule: int | None = None


@dataclass(frozen=True)
class Plan:
    """Ordered rules; the first that matches a layer decides. Layers that none matches stay.

    Attributes:
        rules: the rules.
        name: for reports.
    """

    rules: tuple[Rule, ...]
    name: str = "plan"

    def __post_init__(self) -> None:
        if not any(rule.scheme for rule in self.rules):
            raise PlanError(f"plan {self.name!r} quantizes nothing: it has no rule with a method")

    @classmethod
    def preset(cls, method: str, **parameters: Any) -> Plan:
        """Every matrix in the decoder blocks under one method.

        Args:
            method: a name in `quantine.methods.METHODS`.
            parameters: fields of `QuantSpec` and of the method, such as ``bits``, ``group_size``,
                ``sym``, ``damp``.

        Raises:
            PlanError: unknown method or parameter, or a value out of range.
        """
        scheme = scheme_from({"method": method, **parameters}, f"preset {method!r}")
        if scheme is None:
            raise PlanError(f"preset {method!r} quantizes nothing")
        group = "row" if scheme.spec.group_size == -1 else f"g{scheme.spec.group_size}"
        return cls((Rule("@blocks", scheme),), f"{method}-{scheme.spec.bits}bit-{group}")

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], name: str = "plan") -> Plan:
        """Invert `as_dict`, or read hand-written rules.

        Raises:
            PlanError: a rule is malformed.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("rules"), list):
            raise PlanError(f"plan {name!r} must be a mapping with a list of `rules`")
        if unknown := set(value) - {"name", "rules"}:
            raise PlanError(
                f"plan {name!r} has unknown keys: {', '.join(sorted(map(str, unknown)))}"
            )
        rules = []
        for number, rule in enumerate(value["rules"], 1):
            where = f"rule {number} of plan {name!r}"
            if not isinstance(rule, Mapping) or not isinstance(rule.get("match"), str):
                raise PlanError(f"{where} must be a mapping with a `match` pattern")
            scheme = scheme_from({k: v for k, v in rule.items() if k != "match"}, where)
            rules.append(Rule(rule["match"], scheme))
        return cls(tuple(rules), str(value.get("name", name)))

    @classmethod
    def from_file(cls, path: str | Path) -> Plan:
        """Read a YAML or, by its suffix, a JSON plan.

        Raises:
            PlanError: no such file, or it is malformed.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            # PyYAML takes neither tabs nor numbers such as 1e-05, which are fine JSON.
            value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise PlanError(f"plan {path} cannot be read: {error}") from error
        return cls.from_dict(value, path.stem)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with every default spelled out."""
        rules = [
            {"match": rule.match, **(rule.scheme.as_dict() if rule.scheme else {"method": KEEP})}
            for rule in self.rules
        ]
        return {"name": self.name, "rules": rules}

    def resolve(self, layers: Sequence[Layer]) -> list[Decision]:
        """What happens to each of ``layers``; everything that can be refused is refused here.

        Raises:
            PlanError: a rule matches nothing, group sizes do not divide (all layers are listed,
                with sizes that do), or a method cannot do what is asked of it.
        """
        for number, rule in enumerate(self.rules, 1):
            if not any(rule.matches(layer) for layer in layers):
                raise PlanError(
                    f"rule {number} ({rule.match!r}) of plan {self.name!r} matches no layer; "
                    f"layers are called like {layers[len(layers) // 2].name!r}"
                )
        decisions = [self._decide(layer) for layer in layers]
        _check_groups(decisions)
        for decision in decisions:
            _check_scheme(decision)
        if not any(decision.scheme for decision in decisions):
            raise PlanError(f"plan {self.name!r} leaves every layer in 16 bit")
        return decisions

    def _decide(self, layer: Layer) -> Decision:
        for number, rule in enumerate(self.rules, 1):
            if rule.matches(layer):
                return Decision(layer, rule.scheme, f"rule {number}: {rule.match}", number)
        return Decision(layer, None, "no rule matches")


def scheme_from(value: Mapping[str, Any], where: str) -> Scheme | None:
    """A scheme from plain values: ``method``, and fields of its solver and of `QuantSpec`.

    Raises:
        PlanError: says what is wrong, ``where``, and what would be right.
    """
    method = value.get("method")
    fields = {key: item for key, item in value.items() if key not in {"method", "format"}}
    if method == KEEP:
        if fields or "format" in value:
            raise PlanError(f"{where}: method {KEEP!r} takes no parameters")
        return None
    if not isinstance(method, str) or method not in METHODS:
        raise PlanError(
            f"{where}: method must be one of {', '.join([*METHODS, KEEP])}, not {method!r}"
        )
    kind = METHODS[method]
    spec_types, solver_types = _field_types(QuantSpec), _field_types(kind)
    for key, item in fields.items():
        expected = {**spec_types, **solver_types}.get(key)
        if expected is None:
            known = ", ".join([*spec_types, *solver_types])
            raise PlanError(f"{where}: {method} has no parameter {key!r} (it has {known})")
        if expected in {int, float, bool} and not _is_a(item, expected):
            raise PlanError(f"{where}: {key} must be {expected.__name__}, not {item!r}")
    try:
        asked = {k: v for k, v in fields.items() if k in spec_types}
        spec = dataclasses.replace(kind.default_spec, **asked)
        solver = kind(**{k: _special(v) for k, v in fields.items() if k in solver_types})
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
    fitting = [n for n, f in FORMATS.items() if f.supports(spec, solver.outlier_share != 0)]
    layout = value.get("format", fitting[0])
    if not isinstance(layout, str) or layout not in FORMATS:
        raise PlanError(f"{where}: format must be one of {', '.join(FORMATS)}, not {layout!r}")
    if layout not in fitting:
        raise PlanError(
            f"{where}: format {layout!r} cannot hold what is asked for; {fitting[0]!r} can"
        )
    return Scheme(solver, spec, layout)


def _plain(item: object) -> object:
    """``item`` as JSON has it, which knows no infinity."""
    return INFINITE if item == math.inf else item


def _special(item: object) -> object:
    """Invert `_plain`."""
    return math.inf if item == INFINITE else item


def _field_types(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _is_a(item: object, kind: type) -> bool:
    if kind is float and item == INFINITE:
        return True
    if kind is bool or isinstance(item, bool):
        return kind is bool and isinstance(item, bool)
    return isinstance(item, (int, float) if kind is float else kind)


def _check_groups(decisions: Sequence[Decision]) -> None:
    refused: dict[tuple[int, int], list[str]] = {}
    for decision in decisions:
        layer, scheme = decision.layer, decision.scheme
        if scheme is not None and not scheme.spec.divides(layer.in_features):
            key = (scheme.spec.group_size, layer.in_features)
            refused.setdefault(key, []).append(layer.name)
    if not refused:
        return
    lines = []
    for (group_size, in_features), names in refused.items():
        sizes = ", ".join(map(str, nearest_group_sizes(in_features, group_size)))
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(
            f"  group size {group_size} does not divide {in_features} inputs of {shown}; "
            f"nearest sizes that do: {sizes}, or -1 for the whole row"
        )
    raise PlanError("groups must tile the inputs of a layer:\n" + "\n".join(lines))


def _check_scheme(decision: Decision) -> None:
    layer, scheme = decision.layer, decision.scheme
    if scheme is not None and layer.role != "block" and scheme.solver.needs_inputs:
        raise PlanError(
            f"{layer.name} ({layer.role}) can be quantized only by methods that need no inputs, "
            f"not by {scheme.method}: use method rtn in the rule that matches it "
            f"({decision.reason})"
        )
