"""How measured numbers are written, in tables, cards and pages alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def number(value: float | None, form: str) -> str:
    """A number; nothing where there is none."""
    return "" if value is None else f"{value:{form}}"


def with_error(value: float | None, error: float | None, form: str) -> str:
    """A number and its standard error."""
    return number(value, form) + ("" if error is None else f" ± {error:{form}}")


def with_interval(value: float, low: float | None, high: float | None, form: str) -> str:
    """A number and its confidence interval."""
    return f"{value:{form}}" + ("" if low is None else f" ({low:{form}} to {high:{form}})")


def recovery(measured: Mapping[str, Any]) -> str:
    """The recovery of a text or task, and its interval; nothing where it is not defined."""
    if measured["recovery"] is None:
        return ""
    bounds = measured["recovery_low"], measured["recovery_high"]
    return with_interval(measured["recovery"], *bounds, ".1%")
