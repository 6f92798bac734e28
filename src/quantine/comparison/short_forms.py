"""The short forms of plans in a comparison: a file, a preset or scheme, or a budget."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import yaml

from quantine.core.spec import GROUP_AXES
from quantine.core.transform_spec import Rotate
from quantine.core.tuning_spec import tuning_from
from quantine.errors import PlanError
from quantine.plan.plan import Plan

FLOAT: Final = "float"
"""Name of the row of the float model itself."""
FILES: Final = (".yaml", ".yml", ".json")
"""Suffixes that make a short form the path of a plan file."""
PRESET: Final = "preset:"
"""Start of a short form that names a preset."""
SCHEME: Final = "scheme:"
"""Start of a short form that names a scheme of weights and activations."""


def plans_of(short_forms: Sequence[str]) -> dict[str, Plan]:
    """The plans that the ``short_forms`` mean, by names that can be file names.

    Raises:
        PlanError: a short form means nothing, or two have one name.
    """
    plans: dict[str, Plan] = {}
    for short in short_forms:
        name = name_of(short)
        if name in plans:
            raise PlanError(f"two plans are called {name!r}: leave out or rename one")
        plans[name] = plan_of(short)
    return plans


def plan_of(short: str) -> Plan:
    """The plan that the short form ``short`` means.

    Args:
        short: the path of a plan file; ``preset:NAME``, with ``:key=value`` for each parameter,
            as in ``preset:gptq:bits=3``; a scheme of weights and activations in the same way, as in
            ``scheme:W4A8`` or ``scheme:W4A4KV:method=spqr``; or a budget in bits per weight, as in
            ``3.65``, with the parameters ``both_axes`` and ``head_bits``, as in
            ``3.65:both_axes=true``. All but plan files take ``tune``, as in ``3.65:tune=quick``,
            and ``rotate=true``.

    Raises:
        PlanError: none of these, or the plan is malformed.
    """
    if Path(short).suffix in FILES:
        return Plan.from_file(short)
    name, *fields = _bare(short).split(":")
    try:
        parameters = dict(_parameter(field) for field in fields)
    except (ValueError, yaml.YAMLError) as error:
        raise PlanError(f"{short!r}: parameters look like bits=3, one after each `:`") from error
    tuning = tuning_from(parameters.pop("tune", None), repr(short))
    rotates = parameters.pop("rotate", False)
    if not isinstance(rotates, bool):
        raise PlanError(f"{short!r}: rotate must be true or false")
    plan = _bare_plan(short, name, parameters)
    plan = replace(plan, transforms=(Rotate(),)) if rotates else plan
    return plan if tuning is None else replace(plan, tune=tuning)


def _bare_plan(short: str, name: str, parameters: dict[str, Any]) -> Plan:
    """The plan that ``name``, which may be a budget, and ``parameters`` of ``short`` mean."""
    if short.startswith(PRESET):
        return Plan.preset(name, **parameters)
    if short.startswith(SCHEME):
        return Plan.scheme(name, **parameters)
    try:
        bits_per_weight = float(name)
    except ValueError as error:
        raise PlanError(
            f"{short!r} is no plan: give a .yaml or .json file, preset:NAME, preset:NAME:bits=3, "
            "scheme:W4A8, or bits per weight such as 3.65"
        ) from error
    return _budget(short, bits_per_weight, **parameters)


def name_of(short: str) -> str:
    """Name of the plan that ``short`` means, for tables and file names.

    Raises:
        PlanError: the name is taken by the model itself.
    """
    name = Path(short).stem if Path(short).suffix in FILES else _bare(short)
    name = re.sub(r"[^\w.=:-]", "_", name).replace(":", ",")
    if name == FLOAT:
        raise PlanError(f"a plan cannot be called {FLOAT!r}, as the model itself is: rename it")
    return name


def _bare(short: str) -> str:
    """The short form without the word that says its kind."""
    return short.removeprefix(PRESET).removeprefix(SCHEME)


def _budget(short: str, bits_per_weight: float, **parameters: object) -> Plan:
    axes, head = parameters.pop("both_axes", False), parameters.pop("head_bits", None)
    if parameters or not isinstance(axes, bool) or not isinstance(head, int | None):
        raise PlanError(f"{short!r}: a budget takes both_axes=true and head_bits=8, nothing else")
    plan = Plan.budget(bits_per_weight, GROUP_AXES if axes else GROUP_AXES[:1])
    return plan if head is None else plan.with_head(head)


def _parameter(field: str) -> tuple[str, object]:
    """Name and value of ``field``, which looks like ``bits=3``."""
    key, value = field.split("=")
    return key, yaml.safe_load(value)
