"""How products with packed matrices are computed; measured in docs/kernels.md."""

from __future__ import annotations

from typing import Final, Literal, TypeGuard

Arithmetic = Literal["exact", "fast"]
"""``exact``: activations as they are, sums in float32. ``fast``: activations are rounded first."""
ARITHMETICS: Final[tuple[Arithmetic, ...]] = ("exact", "fast")
DEFAULT: Final[Arithmetic] = "fast"
"""Of plans."""
UNSTATED: Final[Arithmetic] = "exact"
"""Of directories that do not say."""


def is_arithmetic(value: object) -> TypeGuard[Arithmetic]:
    """Whether ``value`` names one."""
    return isinstance(value, str) and value in ARITHMETICS
