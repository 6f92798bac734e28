"""Plans: which matrix is quantized how. Rules in, one checked scheme per layer out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from quantine.core.activation import ActivationSpec, scheme_named
from quantine.core.arithmetic import ARITHMETICS, DEFAULT, Arithmetic, is_arithmetic
from quantine.core.spec import FLOAT16, nearest_group_sizes
from quantine.errors import PlanError
from quantine.families.base import Layer
from quantine.fields import activations_field, budget_field, choices_field, weight_fields
from quantine.formats import format_named
from quantine.methods import METHODS, SpQR
from quantine.presets import CHOICES, PRESETS, TABLE
from quantine.rules import SEARCH, Rule, rule_from
from quantine.scheme import (
    ADADIM,
    SPQR,
    AdaDim,
    Objective,
    Scheme,
    scheme_from,
)

FLAGS: Final = ("true_sequential", "float_inputs")
"""Fields of a plan that say how inputs are observed."""
OPTIONS: Final = (*FLAGS, "arithmetic")
"""Fields of a plan that presets and plan files may leave out."""


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
    def searched(self) -> bool:
        """Whether the plan's budget decides among the choices."""
        return bool(self.choices) and self.objective is None

    @property
    def needs_inputs(self) -> bool:
        """Whether the layer cannot be quantized without calibration inputs."""
        return bool(self.choices) or (self.scheme is not None and self.scheme.solver.needs_inputs)


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
        float_inputs: observe what the float model puts in, in one pass too, instead of what the
            quantized matrices before put out; as AdaDim's published code does.
        arithmetic: of products with the packed matrices; stored with them.
        activations: what is asked of activations; ``None`` leaves blocks as they are.
    """

    rules: tuple[Rule, ...]
    name: str = "plan"
    bits_per_weight: float | None = None
    choices: tuple[Scheme, ...] = ()
    true_sequential: bool = True
    float_inputs: bool = False
    arithmetic: Arithmetic = DEFAULT
    activations: ActivationSpec | None = None

    def __post_init__(self) -> None:
        for key in FLAGS:
            if not isinstance(getattr(self, key), bool):
                raise PlanError(
                    f"plan {self.name!r}: {key} must be true or false, not {getattr(self, key)!r}"
                )
        if not is_arithmetic(self.arithmetic):
            raise PlanError(
                f"plan {self.name!r}: arithmetic must be one of {', '.join(ARITHMETICS)}, not "
                f"{self.arithmetic!r}"
            )
        if not self.activations and not any(r.scheme or r.searched for r in self.rules):
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
        if self.activations is not None and (searched or self.float_inputs):
            others = "`bits_per_weight` nor with `float_inputs`"
            raise PlanError(f"plan {self.name!r}: activations go neither with {others}")
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
                ``sym``, ``damp``, or of the plan, see `OPTIONS`; they go before the preset's.

        Raises:
            PlanError: unknown name or parameter, or a value out of range.
        """
        methods = (*METHODS, ADADIM)
        if name not in methods and name not in PRESETS:
            known = ", ".join([*methods, *PRESETS])
            raise PlanError(f"preset must be one of {known}, not {name!r}")
        fields = {**PRESETS.get(name, {"method": name}), **parameters}
        options = {key: fields.pop(key) for key in OPTIONS if key in fields}
        rule = rule_from({"match": "@blocks", **fields}, f"preset {name!r}")
        assert rule.scheme is not None
        title = name if name in PRESETS and not parameters else _title(rule.scheme)
        return cls((rule,), title, **options)

    @classmethod
    def scheme(cls, name: str, **parameters: Any) -> Plan:
        """Every matrix in the decoder blocks, and their activations, by a name like ``W4A4KV``.

        Args:
            name: see `quantine.core.activation.scheme_named`.
            parameters: ``method`` (``gptq``), and others as of `preset`.

        Raises:
            PlanError: no such scheme, or a parameter that does not go with it.
        """
        found = scheme_named(name)
        options = {key: parameters.pop(key) for key in OPTIONS if key in parameters}
        fields = weight_fields(found, parameters)
        rule = rule_from({"match": "@blocks", **fields}, f"scheme {name}")
        return cls((rule,), name, activations=found.activations, **options)

    @classmethod
    def budget(cls, bits_per_weight: float, group_axes: Sequence[str] = ("in",)) -> Plan:
        """Every matrix in the decoder blocks under one of `quantine.presets.CHOICES`.

        The choice is made in the run: so that the model's predictions change least, and all packed
        matrices together take at most ``bits_per_weight`` on average.

        Args:
            group_axes: the axes that groups may run along. Along outputs, too, is more exact, but
                products with such matrices are slower; see docs/kernels.md.

        Raises:
            PlanError: a budget that no plan can have.
        """
        fitting = (choice for choice in CHOICES if choice["group_axis"] in group_axes)
        choices = [scheme_from(choice, "a preset choice") for choice in fitting]
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
        known = {field.name for field in dataclasses.fields(cls)} | {"scheme"}
        if unknown := set(value) - known:
            raise PlanError(
                f"plan {name!r} has unknown keys: {', '.join(sorted(map(str, unknown)))}"
            )
        rules = [
            rule_from(rule, f"rule {number} of plan {name!r}")
            for number, rule in enumerate(value["rules"], 1)
        ]
        return cls(
            tuple(rules),
            str(value.get("name", name)),
            budget_field(value, name),
            choices_field(value, name),
            **{key: value[key] for key in OPTIONS if key in value},
            activations=activations_field(value, name),
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
        plain: dict[str, Any] = {
            "name": self.name,
            "rules": [rule.as_dict() for rule in self.rules],
            **{key: getattr(self, key) for key in OPTIONS},
        }
        if self.activations is not None:
            plain["activations"] = self.activations.as_dict()
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
        if not self.activations and not any(decision.scheme for decision in decisions):
            raise PlanError(f"plan {self.name!r} leaves every layer in 16 bit")
        return decisions

    def _check_budget(self, decisions: Sequence[Decision]) -> None:
        searched = [decision for decision in decisions if decision.searched]
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
                    return _open(layer, self.choices, reason, number)
                if isinstance(rule.scheme, AdaDim):
                    return _open(layer, rule.scheme.choices, reason, number, rule.scheme.objective)
                settled = rule.scheme and rule.scheme.settled(layer)
                return Decision(layer, settled, reason, number)
        return Decision(layer, None, "no rule matches")


def with_clusters(decision: Decision, sizes: tuple[int, ...]) -> Decision:
    """The decision with clusters of ``sizes``, if its layer's groups are clusters."""
    scheme = decision.scheme
    if scheme is None or not scheme.spec.clustered:
        return decision
    spec = dataclasses.replace(scheme.spec, cluster_sizes=sizes)
    return dataclasses.replace(decision, scheme=dataclasses.replace(scheme, spec=spec))


def _open(
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


def _title(scheme: Scheme | AdaDim) -> str:
    """What a plan of one rule is called."""
    first = scheme.choices[0] if isinstance(scheme, AdaDim) else scheme
    group = "row" if first.spec.group_size == -1 else f"g{first.spec.group_size}"
    ada = "-ada" if isinstance(scheme, AdaDim) else ""
    return f"{first.method}{ada}-{first.spec.bits}bit-{group}"


def _check_groups(decisions: Sequence[Decision]) -> None:
    refused: dict[tuple[int, int, str], list[str]] = {}
    for decision in decisions:
        layer, scheme = decision.layer, decision.scheme
        if scheme is not None and not scheme.tiles(layer):
            spec = scheme.spec
            length = spec.lines(layer.out_features, layer.in_features)[1]
            key = (spec.group_size, length, f"{spec.group_axis}puts")
            refused.setdefault(key, []).append(layer.name)
    if not refused:
        return
    lines = []
    for (group_size, length, kind), names in refused.items():
        sizes = ", ".join(map(str, nearest_group_sizes(length, group_size)))
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(
            f"  group size {group_size} does not divide {length} {kind} of {shown}; "
            f"nearest sizes that do: {sizes}, or -1 for all of them"
        )
    raise PlanError("groups must tile the lines of a layer:\n" + "\n".join(lines))


def _check_scheme(decision: Decision) -> None:
    layer, scheme = decision.layer, decision.scheme
    if scheme is not None and layer.role != "block" and decision.needs_inputs:
        method = ADADIM if decision.choices else scheme.method
        raise PlanError(
            f"{layer.name} ({layer.role}) can be quantized only by methods that need no inputs, "
            f"not by {method}: use method rtn in the rule that matches it "
            f"({decision.reason})"
        )
    for one in decision.choices or ((scheme,) if scheme else ()):
        layout = format_named(one.format)
        reason = layout.refusal(one.spec, layer.out_features, layer.in_features)
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
