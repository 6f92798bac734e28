"""Plans: ordered rules that give each layer of a model one checked scheme."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from quantine.core.activation_spec import ActivationSpec
from quantine.core.arithmetic import ARITHMETICS, DEFAULT, Arithmetic, is_arithmetic
from quantine.core.spec import FLOAT16, GROUP_AXES
from quantine.core.transform_spec import Rotate, transforms_from
from quantine.core.tuning_spec import SETTINGS, Tuning, tuning_from
from quantine.errors import PlanError, cut, shown
from quantine.families.layers import Layer
from quantine.methods import METHODS
from quantine.methods.adadim import ADADIM, AdaDim
from quantine.methods.spqr import SpQR
from quantine.plan.checks import check_exclusive, check_groups, check_scheme
from quantine.plan.decision import Decision, decide_later
from quantine.plan.parsing import activations_field, budget_field, choices_field, weight_fields
from quantine.plan.presets import BEST, BEST_TUNING, CHOICES, PRESETS, TABLE
from quantine.plan.rules import BY_BUDGET, Rule, rule_from
from quantine.plan.scheme import Scheme
from quantine.plan.scheme_parsing import scheme_from
from quantine.plan.shorthand import parse_shorthand

FLAGS: Final = ("true_sequential", "float_inputs")
"""Boolean fields of a plan that say on which model calibration inputs are observed."""
LOSS_WEIGHTS: Final = "loss_weights"
"""Field of a plan that says whether tokens count by the loss; plain values have it where it is
true."""
LONGEST_NAME: Final = 80
"""Most characters of the name of a plan."""
SPELLED_OUT: Final = (*FLAGS, "arithmetic")
"""Fields of a plan that presets and plan files may leave out, and plain values always have."""
COMPENSATE: Final = "compensate"
"""Field of a plan that says whether matrices make up for errors before them; plain values have it
where it is true."""
OPTIONS: Final = (*SPELLED_OUT, LOSS_WEIGHTS, COMPENSATE)
"""Fields of a plan that presets and plan files may set and may leave out."""


@dataclass(frozen=True)
class Plan:
    """Ordered rules, of which the first that matches a layer decides; other layers stay in 16 bit.

    Attributes:
        rules: the rules, in order.
        name: name of the plan in reports and errors.
        bits_per_weight: budget for the layers of rules with method ``search``: bits per weight that
            they may take on average, all stored bits counted. ``None`` without such rules.
        choices: schemes among which the budget chooses, all of method ``spqr``.
        true_sequential: whether an input is observed after the matrices before it in the same block
            are quantized. ``False`` observes all inputs of a block in one pass before any of its
            matrices is, as SpQR's published code does.
        float_inputs: whether inputs are those of the float model, observed in one pass, instead of
            what the quantized matrices before put out; as AdaDim's published code does.
        arithmetic: how products with the packed matrices are computed, see
            `quantine.core.arithmetic.Arithmetic`; stored in the output directory.
        activations: how activations are quantized; ``None`` leaves them as they are.
        tune: how the quantized model is tuned by gradient; ``None`` leaves it as it is.
        transforms: what is done to the float model before, without changing what it computes; at
            most one rotation.
        loss_weights: whether calibration tokens count by how much the model's loss depends on what
            the matrices make of them, and outputs make up for errors of others that act on it
            together, see `quantine.calibrate.loss_weights`.
        compensate: whether matrices that write to hidden states also make up for errors before
            them, see `quantine.calibrate.compensation`.

    Raises:
        PlanError: a field has a value that is not allowed, fields contradict each other, or nothing
            would be quantized.
    """

    rules: tuple[Rule, ...]
    name: str = "plan"
    bits_per_weight: float | None = None
    choices: tuple[Scheme, ...] = ()
    true_sequential: bool = True
    float_inputs: bool = False
    arithmetic: Arithmetic = DEFAULT
    activations: ActivationSpec | None = None
    tune: Tuning | None = None
    transforms: tuple[Rotate, ...] = ()
    loss_weights: bool = False
    compensate: bool = False

    def __post_init__(self) -> None:
        for key in (*FLAGS, LOSS_WEIGHTS, COMPENSATE):
            value = getattr(self, key)
            if not isinstance(value, bool):
                raise PlanError(
                    f"plan {self.name!r}: {key} must be true or false, not {shown(value)}"
                )
        if not isinstance(self.tune, Tuning | None):
            raise PlanError(f"plan {self.name!r}: tune must be a Tuning, not {shown(self.tune)}")
        if not all(isinstance(one, Rotate) for one in self.transforms):
            raise PlanError(
                f"plan {self.name!r}: transforms must be Rotate, not {shown(self.transforms)}"
            )
        if not is_arithmetic(self.arithmetic):
            raise PlanError(
                f"plan {self.name!r}: arithmetic must be one of {', '.join(ARITHMETICS)}, not "
                f"{shown(self.arithmetic)}"
            )
        if not self.activations and not any(r.scheme or r.by_budget for r in self.rules):
            raise PlanError(f"plan {self.name!r} quantizes nothing: it has no rule with a method")
        searched = any(rule.by_budget for rule in self.rules)
        if searched != (self.bits_per_weight is not None) or searched != bool(self.choices):
            raise PlanError(
                f"plan {self.name!r}: `bits_per_weight`, `choices` and a rule of method "
                f"{BY_BUDGET!r} belong together"
            )
        if self.bits_per_weight is not None and not 0 < self.bits_per_weight <= FLOAT16:
            raise PlanError(
                f"plan {self.name!r}: bits_per_weight must be above 0 and at most {FLOAT16}, not "
                f"{self.bits_per_weight}"
            )
        if self.activations is not None and self.float_inputs:
            raise PlanError(
                f"plan {self.name!r}: activations do not go with `float_inputs`: leave one out"
            )
        if self.float_inputs and self.compensate:
            raise PlanError(
                f"plan {self.name!r}: with `float_inputs` no matrix sees the errors that "
                "`compensate` makes up for: leave one out"
            )
        for scheme in self.choices:
            if scheme.layout.exclusive:
                raise PlanError(
                    f"plan {self.name!r}: format {scheme.format!r} is no choice, its directories "
                    "hold nothing else: give it in a rule"
                )
            if not isinstance(scheme.solver, SpQR):
                raise PlanError(
                    f"plan {self.name!r}: choices must be of method spqr, not {scheme.method}"
                )

    @classmethod
    def preset(cls, name: str, **parameters: Any) -> Plan:
        """A plan that quantizes every matrix in the decoder blocks: by one method, or the best way.

        Args:
            name: a method in `quantine.methods.METHODS`, ``adadim``, or a preset in
                `quantine.plan.presets.PRESETS` or `quantine.plan.presets.BEST`.
            parameters: fields of `quantine.core.spec.QuantSpec`, of the method, or of the plan (see
                `OPTIONS`), such as ``bits``, ``group_size``, ``sym`` or ``damp``. They override
                those of the preset. The best presets take none.

        Raises:
            PlanError: unknown name or parameter, or a value out of range.
        """
        if name in BEST:
            return cls._best(name, parameters)
        methods = (*METHODS, ADADIM)
        if name not in methods and name not in PRESETS:
            known = ", ".join([*methods, *PRESETS, *BEST])
            raise PlanError(f"preset must be one of {known}, not {name!r}")
        fields = {**PRESETS.get(name, {"method": name}), **parameters}
        options = {key: fields.pop(key) for key in OPTIONS if key in fields}
        rule = rule_from({"match": "@blocks", **fields}, f"preset {name!r}")
        assert rule.scheme is not None
        title = name if name in PRESETS and not parameters else _title(rule.scheme)
        return cls((rule,), title, **options)

    @classmethod
    def scheme(cls, name: str, **parameters: Any) -> Plan:
        """A plan for weights and activations of every decoder block, by a name like ``W4A4KV``.

        Args:
            name: the scheme, see `quantine.plan.shorthand.parse_shorthand`.
            parameters: ``method``, by default ``gptq``, and others as for `preset`.

        Raises:
            PlanError: there is no such scheme, or a parameter does not go with it.
        """
        found = parse_shorthand(name)
        options = {key: parameters.pop(key) for key in OPTIONS if key in parameters}
        fields = weight_fields(found, parameters)
        rule = rule_from({"match": "@blocks", **fields}, f"scheme {name}")
        return cls((rule,), name, activations=found.activations, **options)

    @classmethod
    def budget(cls, bits_per_weight: float, group_axes: Sequence[str] = ("in",)) -> Plan:
        """A plan that spends a budget of bits on the matrices in the decoder blocks.

        During the run each matrix gets one of the schemes in `quantine.plan.presets.CHOICES`, so
        that the model's predictions change least while all packed matrices together take at most
        ``bits_per_weight`` on average.

        Args:
            bits_per_weight: the budget, in bits per weight, all stored bits counted.
            group_axes: the axes along which groups may run. Adding ``"out"`` is more exact, but
                products with such matrices are slower; see docs/kernels.md.

        Raises:
            PlanError: the budget is not above 0 and at most 16, or no choices are left.
        """
        fitting = (choice for choice in CHOICES if choice["group_axis"] in group_axes)
        choices = [scheme_from(choice, "a preset choice") for choice in fitting]
        return cls(
            (Rule("@blocks", by_budget=True),),
            f"budget-{bits_per_weight:g}bit",
            bits_per_weight,
            tuple(choice for choice in choices if choice is not None),
        )

    @classmethod
    def _best(cls, name: str, parameters: Mapping[str, Any]) -> Plan:
        if parameters:
            raise PlanError(
                f"preset {name!r} is a budget of {BEST[name]} bits per weight: leave out "
                f"{', '.join(parameters)}, or give --bits-per-weight"
            )
        found = cls.budget(BEST[name], GROUP_AXES)
        return dataclasses.replace(
            found, name=name, loss_weights=True, compensate=True, tune=SETTINGS[BEST_TUNING]
        )

    def with_activations(self, scheme: str) -> Plan:
        """The same plan for weights, with activations as a scheme such as ``W4A8`` has them.

        What the name says of weights does not count.

        Raises:
            PlanError: there is no such scheme, or activations do not go with this plan.
        """
        found = parse_shorthand(scheme)
        return dataclasses.replace(
            self, name=f"{self.name}-{scheme}", activations=found.activations
        )

    def with_head(self, bits: int) -> Plan:
        """The same plan, but with the token table and the output head rounded to ``bits`` bits.

        A table that both share (tied weights) is stored once and serves both. Every token reads the
        whole head, which is a large part of a small model.

        Args:
            bits: number of bits of one code, 2 to 8.

        Raises:
            PlanError: ``bits`` is out of range.
        """
        scheme = scheme_from({**TABLE, "bits": bits}, f"the head of plan {self.name!r}")
        tables = (Rule("@embedding", scheme), Rule("@head", scheme))
        name = f"{self.name}-head{bits}"
        return dataclasses.replace(self, rules=(*tables, *self.rules), name=name)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], name: str = "plan") -> Plan:
        """A plan from plain values: the result of `as_dict`, or rules written by hand.

        Args:
            value: a mapping with a list of ``rules`` and optional other fields.
            name: name of the plan unless ``value`` has one.

        Raises:
            PlanError: a rule or field is malformed or unknown.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("rules"), list):
            raise PlanError(f"plan {name!r} must be a mapping with a list of `rules`")
        known = {field.name for field in dataclasses.fields(cls)} | {"scheme"}
        if unknown := set(value) - known:
            raise PlanError(
                f"plan {name!r} has unknown keys: {cut(', '.join(sorted(map(str, unknown))))}"
            )
        title = str(value.get("name", name))
        if len(title) > LONGEST_NAME:
            raise PlanError(
                f"a plan's name has at most {LONGEST_NAME} characters, not {cut(title)}"
            )
        rules = [
            rule_from(rule, f"rule {number} of plan {name!r}")
            for number, rule in enumerate(value["rules"], 1)
        ]
        return cls(
            tuple(rules),
            title,
            budget_field(value, name),
            choices_field(value, name),
            **{key: value[key] for key in OPTIONS if key in value},
            activations=activations_field(value, name),
            tune=tuning_from(value.get("tune"), f"plan {name!r}"),
            transforms=transforms_from(value.get("transforms"), f"plan {name!r}"),
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Plan:
        """Read a plan from a file: JSON if its name ends with ``.json``, else YAML.

        Args:
            path: the file, whose stem names the plan unless the plan has a ``name``.

        Raises:
            PlanError: there is no such file, or it is malformed.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            # PyYAML takes neither tabs nor numbers such as 1e-05, which are fine JSON.
            value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise PlanError(f"plan {path} cannot be read: {cut(error, 200)}") from error
        return cls.from_dict(value, path.stem)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold, with every default spelled out."""
        plain: dict[str, Any] = {
            "name": self.name,
            "rules": [rule.as_dict() for rule in self.rules],
            **{key: getattr(self, key) for key in SPELLED_OUT},
        }
        for key in (LOSS_WEIGHTS, COMPENSATE):
            if getattr(self, key):
                plain[key] = True
        if self.activations is not None:
            plain["activations"] = self.activations.as_dict()
        if self.tune is not None:
            plain["tune"] = self.tune.as_dict()
        if self.transforms:
            plain["transforms"] = [transform.as_plain() for transform in self.transforms]
        if self.bits_per_weight is not None:
            plain["bits_per_weight"] = self.bits_per_weight
            plain["choices"] = [scheme.as_dict() for scheme in self.choices]
        return plain

    def resolve(self, layers: Sequence[Layer]) -> list[Decision]:
        """Decide what happens to each layer; whatever can be refused is refused here.

        Args:
            layers: all layers of the model, in running order.

        Returns:
            One decision per layer, in that order.

        Raises:
            PlanError: a rule matches nothing, group sizes do not divide (all layers are listed,
                with sizes that do), a method or a format cannot do what is asked of it, or the
                budget is too small.
        """
        for number, rule in enumerate(self.rules, 1):
            if not any(rule.matches(layer) for layer in layers):
                raise PlanError(
                    f"rule {number} ({shown(rule.match)}) of plan {self.name!r} matches no layer; "
                    f"layers are called like {layers[len(layers) // 2].name!r}"
                )
        decisions = [self._decide(layer) for layer in layers]
        check_groups(decisions)
        for decision in decisions:
            check_scheme(decision)
        check_exclusive(decisions, self.activations is not None)
        self._check_budget(decisions)
        if not self.activations and not any(decision.scheme for decision in decisions):
            raise PlanError(f"plan {self.name!r} leaves every layer in 16 bit")
        return decisions

    def _check_budget(self, decisions: Sequence[Decision]) -> None:
        """Check that the smallest choices fit into the budget, if there is one."""
        searched = [decision for decision in decisions if decision.by_budget]
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
        """What the first matching rule says about ``layer``; it stays in 16 bit if none matches."""
        for number, rule in enumerate(self.rules, 1):
            if rule.matches(layer):
                reason = f"rule {number}: {rule.match}"
                if rule.by_budget:
                    return decide_later(layer, self.choices, reason, number)
                if isinstance(rule.scheme, AdaDim):
                    return decide_later(
                        layer, rule.scheme.choices, reason, number, rule.scheme.objective
                    )
                settled = rule.scheme and rule.scheme.settled(layer)
                return Decision(layer, settled, reason, number)
        return Decision(layer, None, "no rule matches")


def _title(scheme: Scheme | AdaDim[Scheme]) -> str:
    """The name of a plan of one rule, made of its method, bits and group size."""
    first = scheme.choices[0] if isinstance(scheme, AdaDim) else scheme
    group = "row" if first.spec.group_size == -1 else f"g{first.spec.group_size}"
    ada = "-ada" if isinstance(scheme, AdaDim) else ""
    return f"{first.method}{ada}-{first.spec.bits}bit-{group}"
