"""Read schemes from plain values, such as those of a YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from quantine.core.spec import CLUSTERS, GROUP_AXES, QuantSpec
from quantine.errors import PlanError, shown
from quantine.formats import FORMATS
from quantine.methods import METHODS
from quantine.methods.adadim import ADADIM, AdaDim
from quantine.methods.spqr import SpQR
from quantine.plan.scheme import AVERAGE, KEEP, Scheme


def scheme_from(value: Mapping[str, Any], where: str) -> Scheme | None:
    """A scheme from plain values.

    Args:
        value: ``method``, and optionally ``format`` and fields of the method's solver and of
            `QuantSpec`. Fields that are left out have their defaults; the format is then the first
            that can hold the result.
        where: the place of the scheme in the plan, named in errors.

    Returns:
        The scheme; ``None`` for method ``keep``.

    Raises:
        PlanError: a field is unknown or has a value that is not allowed; the message says what
            would be right.
    """
    method = value.get("method")
    fields = {key: item for key, item in value.items() if key not in {"method", "format"}}
    if method == KEEP:
        if fields or "format" in value:
            raise PlanError(f"{where}: method {KEEP!r} takes no parameters")
        return None
    if not isinstance(method, str) or method not in METHODS:
        raise PlanError(
            f"{where}: method must be one of {', '.join([*METHODS, KEEP])}, not {shown(method)}"
        )
    kind = METHODS[method]
    spec_types, solver_types = _field_types(QuantSpec), _field_types(kind)
    types = {**spec_types, **solver_types, **({AVERAGE: float} if kind is SpQR else {})}
    _check_types(fields, types, method, where)
    try:
        asked = {k: v for k, v in fields.items() if k in spec_types}
        if "cluster_sizes" in asked:
            asked["cluster_sizes"] = tuple(asked["cluster_sizes"])
        spec = dataclasses.replace(kind.default_spec, **asked)
        solver = kind(**{k: _special(v) for k, v in fields.items() if k in solver_types})
        if spec.clustered and not solver.takes_clusters:
            raise PlanError(
                f"{method} with these parameters cannot make groups of clusters (group_size "
                f"{CLUSTERS}): give a group_size, or use gptq or rtn"
            )
        if spec.blocked and not solver.takes_clusters:
            raise PlanError(
                f"{method} with these parameters fits no grids that are signed or have minima: use "
                "gptq with groups: static, or rtn"
            )
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
    average = number(fields.get(AVERAGE, 0.0))
    keeps = bool(average) or solver.outlier_share != 0
    fitting = [n for n, f in FORMATS.items() if f.writable and f.supports(spec, keeps)]
    if not fitting:
        raise PlanError(f"{where}: no format holds such a grid: docs/format.md lists ggml's types")
    layout = value.get("format", fitting[0])
    if not isinstance(layout, str) or layout not in FORMATS:
        raise PlanError(f"{where}: format must be one of {', '.join(FORMATS)}, not {shown(layout)}")
    if layout not in fitting:
        raise PlanError(
            f"{where}: format {shown(layout)} cannot hold what is asked for; {fitting[0]!r} can"
        )
    try:
        return Scheme(solver, spec, layout, average)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error


def _check_types(
    fields: Mapping[str, Any], types: Mapping[str, Any], method: str, where: str
) -> None:
    """Check that each field is known and a number or boolean where its type asks for one."""
    for key, item in fields.items():
        expected = types.get(key)
        if expected is None:
            known = ", ".join(types)
            raise PlanError(f"{where}: {method} has no parameter {shown(key)} (it has {known})")
        if expected in {int, float, bool} and not is_a(item, expected):
            raise PlanError(f"{where}: {key} must be {expected.__name__}, not {shown(item)}")


def _special(item: Any) -> Any:
    """Read numbers that YAML takes for text, such as ``1e-3``, ``1%`` or ``inf``."""
    read = _number(item) if isinstance(item, str) else None
    return item if read is None else read


def _number(text: str) -> float | None:
    """The number that ``text`` stands for, such as ``1e-3`` or ``1%``; ``None`` if it is none."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _field_types(kind: type) -> dict[str, Any]:
    """The types of the fields of a dataclass, by name."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def number(item: float | str) -> float:
    """The number of a plain value that `is_a` float."""
    return float(_special(item))


def is_a(item: object, kind: type) -> bool:
    """Whether a plain value has type ``kind``.

    Integers and texts such as ``1%`` count as floats; booleans do not count as numbers.
    """
    if kind is float and isinstance(item, str):
        return _number(item) is not None
    if kind is bool or isinstance(item, bool):
        return kind is bool and isinstance(item, bool)
    return isinstance(item, (int, float) if kind is float else kind)


def adadim_from(value: Mapping[str, Any], where: str) -> AdaDim[Scheme]:
    """An AdaDim choice between schemes from plain values.

    Args:
        value: ``inner``, the method of all choices; ``choices``, a list of mappings, by default one
            for each group axis; ``objective``; and fields that all choices have in common.
        where: the place of the choice in the plan, named in errors.

    Raises:
        PlanError: a scheme is malformed, see `scheme_from`, or cannot be a choice.
    """
    own = ("method", "inner", "choices", "objective")
    common = {key: item for key, item in value.items() if key not in own}
    if "inner" in value:
        common["method"] = value["inner"]
    elif "choices" not in value:
        raise PlanError(f"{where}: {ADADIM} needs `inner`, one of {', '.join(METHODS)}")
    listed = value.get("choices", [{"group_axis": axis} for axis in GROUP_AXES])
    if not isinstance(listed, list) or not all(isinstance(one, Mapping) for one in listed):
        raise PlanError(f"{where}: choices must be a list of mappings")
    schemes = [
        scheme_from({**common, **one}, f"choice {number} of {where}")
        for number, one in enumerate(listed, 1)
    ]
    for scheme in schemes:
        if scheme is None or scheme.layout.exclusive:
            refused = f"method {KEEP!r}" if scheme is None else f"format {scheme.format!r}"
            raise PlanError(f"{where}: {refused} is no choice: give it in a rule")
    try:
        return AdaDim(
            tuple(scheme for scheme in schemes if scheme is not None),
            value.get("objective", "output"),
        )
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
