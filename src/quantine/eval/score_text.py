"""Measured numbers as text, the same in tables, model cards and report pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def number(value: float | None, form: str) -> str:
    """``value`` in the format ``form``, such as ``".2f"``; empty for ``None``."""
    return "" if value is None else f"{value:{form}}"


def with_error(value: float | None, error: float | None, form: str) -> str:
    """``value ± error``, both in the format ``form``; what is ``None`` is left out."""
    return number(value, form) + ("" if error is None else f" ± {error:{form}}")


def with_interval(value: float, low: float | None, high: float | None, form: str) -> str:
    """``value (low to high)``, all in the format ``form``; without bounds only the value."""
    return f"{value:{form}}" + ("" if low is None else f" ({low:{form}} to {high:{form}})")


def recovery(measured: Mapping[str, Any]) -> str:
    """The recovery of a text or task in percent, with its interval; empty where it is ``None``.

    Args:
        measured: what `quantine.eval.evaluate.evaluate` has of one text or task.
    """
    if measured["recovery"] is None:
        return ""
    bounds = measured["recovery_low"], measured["recovery_high"]
    return with_interval(measured["recovery"], *bounds, ".1%")
