"""The two ways to multiply activations with packed matrices, compared in docs/kernels.md."""

from __future__ import annotations

from typing import Final, Literal, TypeGuard

Arithmetic = Literal["exact", "fast"]
"""Name of one way to compute such a product. ``exact``: activations stay as they are, and products
are summed in float32. ``fast``: activations are rounded first."""
ARITHMETICS: Final[tuple[Arithmetic, ...]] = ("exact", "fast")
"""Names of both ways, in a form to check against."""
DEFAULT: Final[Arithmetic] = "fast"
"""Arithmetic of a plan that names none."""
UNSTATED: Final[Arithmetic] = "exact"
"""Arithmetic of an output directory whose ``config.json`` names none."""


def is_arithmetic(value: object) -> TypeGuard[Arithmetic]:
    """Whether ``value`` is the name of an arithmetic, one of `ARITHMETICS`."""
    return isinstance(value, str) and value in ARITHMETICS
