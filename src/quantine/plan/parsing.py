"""Read the fields of a plan from plain values, such as those of a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantine.core.activation_spec import UNQUANTIZED, ActivationSpec, activations_from
from quantine.core.spec import CLUSTERS
from quantine.errors import PlanError, shown
from quantine.plan.presets import CLUSTERED, PUBLISHED_RPTQ
from quantine.plan.scheme import KEEP, Scheme
from quantine.plan.scheme_parsing import is_a, number, scheme_from
from quantine.plan.shorthand import Shorthand, parse_shorthand


def budget_field(value: Mapping[str, Any], name: str) -> float | None:
    """Read ``bits_per_weight``, in bits; ``None`` if the plan has no budget.

    Args:
        value: the plan as plain values.
        name: the plan's name, for errors.

    Raises:
        PlanError: it is not a number.
    """
    bits = value.get("bits_per_weight")
    if bits is not None and not is_a(bits, float):
        raise PlanError(f"plan {name!r}: bits_per_weight must be a number, not {shown(bits)}")
    return None if bits is None else number(bits)


def choices_field(value: Mapping[str, Any], name: str) -> tuple[Scheme, ...]:
    """Read ``choices``, the schemes among which a budget decides; empty if there are none.

    Args:
        value: the plan as plain values.
        name: the plan's name, for errors.

    Raises:
        PlanError: it is not a list of schemes.
    """
    found = value.get("choices", [])
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise PlanError(f"plan {name!r}: choices must be a list of mappings")
    schemes = [
        scheme_from(one, f"choice {number} of plan {name!r}") for number, one in enumerate(found, 1)
    ]
    if None in schemes:
        raise PlanError(f"plan {name!r}: method {KEEP!r} is no choice")
    return tuple(scheme for scheme in schemes if scheme is not None)


def activations_field(value: Mapping[str, Any], name: str) -> ActivationSpec | None:
    """Read ``activations``, or take them from the plan's ``scheme`` such as ``W4A8``.

    Args:
        value: the plan as plain values.
        name: the plan's name, for errors.

    Returns:
        How activations are quantized; ``None`` if the plan has neither field.

    Raises:
        PlanError: both fields are given, or one is malformed.
    """
    if "activations" in value and "scheme" in value:
        raise PlanError(f"plan {name!r}: give either `activations` or `scheme`")
    if value.get("scheme") is not None:
        return parse_shorthand(str(value["scheme"])).activations
    if value.get("activations") is not None:
        return activations_from(value["activations"], f"plan {name!r}")
    return None


def weight_fields(scheme: Shorthand, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a rule that rounds weights as a scheme such as ``W4A8`` says.

    Args:
        scheme: the scheme; its method is ``gptq`` unless ``asked`` names another.
        asked: fields that override those of the scheme.

    Returns:
        Plain values for `quantine.plan.rules.rule_from`, without ``match``.

    Raises:
        PlanError: fields are asked for although the scheme keeps weights in 16 bit.
    """
    if scheme.weight_bits == UNQUANTIZED:
        if asked:
            raise PlanError(f"the scheme leaves weights in 16 bit: leave out {', '.join(asked)}")
        return {"method": KEEP}
    method = asked.get("method", "gptq")
    grouped = {"group_size": CLUSTERS} if method in CLUSTERED else {}
    published = PUBLISHED_RPTQ if scheme.faithful and method == "gptq" else {}
    return {"method": method, **grouped, **published, **asked, "bits": scheme.weight_bits}
