"""Plans: which matrix is quantized how. Rules in, one checked scheme per layer out."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from quantine.core.arithmetic import ARITHMETICS, DEFAULT, Arithmetic, is_arithmetic
from quantine.core.spec import FLOAT16, nearest_group_sizes
from quantine.errors import PlanError
from quantine.families.base import Layer
from quantine.formats import format_named
from quantine.methods import METHODS, SpQR
from quantine.presets import CHOICES, PRESETS, TABLE
from quantine.scheme import KEEP, Scheme, is_a, scheme_from

SEARCH: Final = "search"
"""The method of a rule whose layers each get one of the plan's choices."""
SPQR: Final = "spqr"
"""The format whose directories hold nothing else, because other programs read them."""
SETS: Final = {"@blocks": "block", "@embedding": "embedding", "@head": "head"}
"""Patterns that stand for every matrix of one role."""


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches ``match`` get ``scheme``; ``None`` keeps them in 16 bit.

    Attributes:
        match: a shell pattern on full layer names, where ``*`` also crosses dots; or
            ``@blocks`` (every matrix inside a decoder block), ``@head``, ``@embedding``.
        scheme: what to do with them.
        searched: give each of them one of the plan's ``choices`` instead.
    """

    match: str
    scheme: Scheme | None = None
    searched: bool = False

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
    """What a plan does with one layer, and why.

    Attributes:
        rule: the number of the rule that decided.
        choices: schemes one of which replaces ``scheme`` in the run; empty where that is settled.
    """

    layer: Layer
    scheme: Scheme | None
    reason: str
    rule: int | None = None
    choices: tuple[Scheme, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Ordered rules; the first that matches a layer decides. Layers that none matches stay.

    Attributes:
        rules: the rules.
        name: for reports.
        bits_per_weight: what searched layers may take on average, all stored bits counted; with
            rules of method ``search`` only.
        choices: what a searched layer may get.
        true_sequential: observe an input after the matrices before it in the same block are
            quantized; otherwise before any of them is, in one pass, as SpQR's published code does.
        arithmetic: of products with the packed matrices; stored with them.
    """

    rules: tuple[Rule, ...]
    name: str = "plan"
    bits_per_weight: float | None = None
    choices: tuple[Scheme, ...] = ()
    true_sequential: bool = True
    arithmetic: Arithmetic = DEFAULT

    def __post_init__(self) -> None:
        if not isinstance(self.true_sequential, bool):
            raise PlanError(
                f"plan {self.name!r}: true_sequential must be true or false, not "
                f"{self.true_sequential!r}"
            )
        if not is_arithmetic(self.arithmetic):
            raise PlanError(
                f"plan {self.name!r}: arithmetic must be one of {', '.join(ARITHMETICS)}, not "
                f"{self.arithmetic!r}"
            )
        if not any(rule.scheme or rule.searched for rule in self.rules):
            raise PlanError(f"plan {self.name!r} quantizes nothing: it has no rule with a method")
        searched = any(rule.searched for rule in self.rules)
        if searched != (self.bits_per_weight is not None) or searched != bool(self.choices):
            raise PlanError(
                f"plan {self.name!r}: `bits_per_weight`, `choices` and a rule of method {SEARCH!r} "
                "belong together"
            )
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight <= FLOAT16:
            raise PlanError(
                f"plan {self.name!r}: bits_per_weight must be above 0 and at most {FLOAT16}, not "
                f"{self.bits_per_weight}"
            )
        for scheme in self.choices:
            if scheme.format == SPQR:
                raise PlanError(
                    f"plan {self.name!r}: format {SPQR!r} is no choice, its directories hold "
                    "nothing else: give it in a rule"
                )
            if not isinstance(scheme.solver, SpQR):
                raise PlanError(
                    f"plan {self.name!r}: choices must be of method spqr, not {scheme.method}"
                )

    @classmethod
    def preset(cls, name: str, **parameters: Any) -> Plan:
        """Every matrix in the decoder blocks under one method.

        Args:
            name: of a method in `quantine.methods.METHODS`, or of `quantine.presets.PRESETS`.
            parameters: fields of `QuantSpec` and of the method, such as ``bits``, ``group_size``,
                ``sym``, ``damp``, or ``true_sequential`` and ``arithmetic``; they go before the
                preset's.

        Raises:
            PlanError: unknown name or parameter, or a value out of range.
        """
        if name not in METHODS and name not in PRESETS:
            known = ", ".join([*METHODS, *PRESETS])
            raise PlanError(f"preset must be one of {known}, not {name!r}")
        fields = {**PRESETS.get(name, {"method": name}), **parameters}
        true_sequential = fields.pop("true_sequential", True)
        arithmetic = fields.pop("arithmetic", DEFAULT)
        scheme = scheme_from(fields, f"preset {name!r}")
        assert scheme is not None
        group = "row" if scheme.spec.group_size == -1 else f"g{scheme.spec.group_size}"
        changed = f"{scheme.method}-{scheme.spec.bits}bit-{group}"
        title = name if name in PRESETS and not parameters else changed
        return cls(
            (Rule("@blocks", scheme),),
            title,
            true_sequential=true_sequential,
            arithmetic=arithmetic,
        )

    @classmethod
    def budget(cls, bits_per_weight: float) -> Plan:
        """Every matrix in the decoder blocks under one of `quantine.presets.CHOICES`.

        The choice is made in the run: so that the model's predictions change least, and all packed
        matrices together take at most ``bits_per_weight`` on average.

        Raises:
            PlanError: a budget that no plan can have.
        """
        choices = [scheme_from(choice, "a preset choice") for choice in CHOICES]
        return cls(
            (Rule("@blocks", searched=True),),
            f"budget-{bits_per_weight:g}bit",
            bits_per_weight,
            tuple(choice for choice in choices if choice is not None),
        )

    def with_head(self, bits: int) -> Plan:
        """The same plan, but with the token table and the output head rounded to ``bits`` bits.

        A table that both share (tied weights) is stored once, and serves both. Every token reads
        the whole head, which is a large part of a small model.

        Raises:
            PlanError: ``bits`` is not 2 to 8.
        """
        scheme = scheme_from({**TABLE, "bits": bits}, f"the head of plan {self.name!r}")
        tables = (Rule("@embedding", scheme), Rule("@head", scheme))
        name = f"{self.name}-head{bits}"
        return dataclasses.replace(self, rules=(*tables, *self.rules), name=name)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], name: str = "plan") -> Plan:
        """Invert `as_dict`, or read hand-written rules.

        Raises:
            PlanError: a rule is malformed.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("rules"), list):
            raise PlanError(f"plan {name!r} must be a mapping with a list of `rules`")
        if unknown := set(value) - {field.name for field in dataclasses.fields(cls)}:
            raise PlanError(
                f"plan {name!r} has unknown keys: {', '.join(sorted(map(str, unknown)))}"
            )
        rules = []
        for number, rule in enumerate(value["rules"], 1):
            where = f"rule {number} of plan {name!r}"
            if not isinstance(rule, Mapping) or not isinstance(rule.get("match"), str):
                raise PlanError(f"{where} must be a mapping with a `match` pattern")
            fields = {k: v for k, v in rule.items() if k != "match"}
            if fields.get("method") == SEARCH and len(fields) > 1:
                raise PlanError(f"{where}: method {SEARCH!r} takes no parameters")
            if fields == {"method": SEARCH}:
                rules.append(Rule(rule["match"], searched=True))
            else:
                rules.append(Rule(rule["match"], scheme_from(fields, where)))
        return cls(
            tuple(rules),
            str(value.get("name", name)),
            _budget_from(value, name),
            _choices_from(value, name),
            value.get("true_sequential", True),
            value.get("arithmetic", DEFAULT),
        )

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
        rules = []
        for rule in self.rules:
            unsettled = {"method": SEARCH if rule.searched else KEEP}
            rules.append(
                {"match": rule.match, **(rule.scheme.as_dict() if rule.scheme else unsettled)}
            )
        plain: dict[str, Any] = {
            "name": self.name,
            "rules": rules,
            "true_sequential": self.true_sequential,
            "arithmetic": self.arithmetic,
        }
        if self.bits_per_weight is not None:
            plain["bits_per_weight"] = self.bits_per_weight
            plain["choices"] = [scheme.as_dict() for scheme in self.choices]
        return plain

    def resolve(self, layers: Sequence[Layer]) -> list[Decision]:
        """What happens to each of ``layers``; everything that can be refused is refused here.

        Raises:
            PlanError: a rule matches nothing, group sizes do not divide (all layers are listed,
                with sizes that do), or a method or a format cannot do what is asked of it.
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
        _check_spqr(decisions)
        self._check_budget(decisions)
        if not any(decision.scheme for decision in decisions):
            raise PlanError(f"plan {self.name!r} leaves every layer in 16 bit")
        return decisions

    def _check_budget(self, decisions: Sequence[Decision]) -> None:
        searched = [decision for decision in decisions if decision.choices]
        if self.bits_per_weight is None or not searched:
            return
        least = sum(min(c.nbytes(d.layer) for c in d.choices) for d in searched)
        bits = least * 8 / sum(decision.layer.weights for decision in searched)
        if bits > self.bits_per_weight:
            raise PlanError(
                f"plan {self.name!r}: {self.bits_per_weight:g} bits per weight are too few, the "
                f"smallest choices take at least {bits:.3f}: raise bits_per_weight or add choices"
            )

    def _decide(self, layer: Layer) -> Decision:
        for number, rule in enumerate(self.rules, 1):
            if rule.matches(layer):
                reason = f"rule {number}: {rule.match}"
                if rule.searched:
                    return self._searched(layer, reason, number)
                return Decision(layer, rule.scheme, reason, number)
        return Decision(layer, None, "no rule matches")

    def _searched(self, layer: Layer, reason: str, rule: int) -> Decision:
        """A decision among the choices whose groups tile the layer; any, if none does."""
        fitting = tuple(c for c in self.choices if c.spec.divides(layer.in_features))
        return Decision(layer, (fitting or self.choices)[0], reason, rule, fitting)


def _budget_from(value: Mapping[str, Any], name: str) -> float | None:
    bits = value.get("bits_per_weight")
    if bits is not None and not is_a(bits, float):
        raise PlanError(f"plan {name!r}: bits_per_weight must be a number, not {bits!r}")
    return None if bits is None else float(bits)


def _choices_from(value: Mapping[str, Any], name: str) -> tuple[Scheme, ...]:
    found = value.get("choices", [])
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise PlanError(f"plan {name!r}: choices must be a list of mappings")
    schemes = [
        scheme_from(one, f"choice {number} of plan {name!r}") for number, one in enumerate(found, 1)
    ]
    if None in schemes:
        raise PlanError(f"plan {name!r}: method {KEEP!r} is no choice")
    return tuple(scheme for scheme in schemes if scheme is not None)


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
    if scheme is not None:
        layout = format_named(scheme.format)
        reason = layout.refusal(scheme.spec, layer.out_features, layer.in_features)
        if reason is not None:
            raise PlanError(f"{layer.name}: {reason} ({decision.reason})")


def _check_spqr(decisions: Sequence[Decision]) -> None:
    """Refuse what a directory that other programs read cannot describe."""
    chosen = [(d.layer, d.scheme.format) for d in decisions if d.scheme is not None]
    first = next((layer.name for layer, layout in chosen if layout == SPQR), None)
    if first is None:
        return
    for layer, layout in chosen:
        if layout != SPQR:
            raise PlanError(
                f"{layer.name} has format {layout!r}, but {first} has {SPQR!r}, whose directories "
                f"hold nothing else: give every quantized layer format {SPQR!r}, or none"
            )
        if layer.role != "block" or layer.transposed:
            kind = "a Conv1D" if layer.transposed else f"the {layer.role}"
            raise PlanError(
                f"{layer.name} is {kind}, but format {SPQR!r} holds only Linear layers inside of "
                "blocks: use format sparse, or keep this layer"
            )
