"""The fields of a plan from plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantine.core.activation_spec import UNQUANTIZED, ActivationSpec, activations_from
from quantine.core.spec import CLUSTERS
from quantine.errors import PlanError
from quantine.plan.presets import CLUSTERED, PUBLISHED_RPTQ
from quantine.plan.scheme import KEEP, Scheme
from quantine.plan.scheme_parsing import is_a, scheme_from
from quantine.plan.shorthand import Shorthand, parse_shorthand


def budget_field(value: Mapping[str, Any], name: str) -> float | None:
    """``bits_per_weight`` of the plan ``name``."""
    bits = value.get("bits_per_weight")
    if bits is not None and not is_a(bits, float):
        raise PlanError(f"plan {name!r}: bits_per_weight must be a number, not {bits!r}")
    return None if bits is None else float(bits)


def choices_field(value: Mapping[str, Any], name: str) -> tuple[Scheme, ...]:
    """``choices`` of the plan ``name``."""
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
    """``activations`` of the plan ``name``, or what its ``scheme`` says of them."""
    if "activations" in value and "scheme" in value:
        raise PlanError(f"plan {name!r}: give either `activations` or `scheme`")
    if value.get("scheme") is not None:
        return parse_shorthand(str(value["scheme"])).activations
    if value.get("activations") is not None:
        return activations_from(value["activations"], f"plan {name!r}")
    return None


def weight_fields(scheme: Shorthand, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a rule says of weights under a named scheme.

    Args:
        asked: parameters that go before the scheme's.

    Raises:
        PlanError: parameters of weights that stay in 16 bit.
    """
    if scheme.weight_bits == UNQUANTIZED:
        if asked:
            raise PlanError(f"the scheme leaves weights in 16 bit: leave out {', '.join(asked)}")
        return {"method": KEEP}
    method = asked.get("method", "gptq")
    grouped = {"group_size": CLUSTERS} if method in CLUSTERED else {}
    published = PUBLISHED_RPTQ if scheme.faithful and method == "gptq" else {}
    return {"method": method, **grouped, **published, **asked, "bits": scheme.weight_bits}
