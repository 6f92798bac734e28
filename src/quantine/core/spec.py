"""What is asked of one weight matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from quantine.errors import PlanError

MIN_BITS: Final = 2
MAX_BITS: Final = 8
WHOLE_ROW: Final = -1


@dataclass(frozen=True)
class QuantSpec:
    """A request for one weight ``[out, in]``.

    Attributes:
        bits: bits of one code, 2 to 8.
        group_size: consecutive inputs of one output row that share a scale and a zero point;
            -1 means the whole row (per channel).
        sym: symmetric grid: the zero point is the middle code and is not stored.
    """

    bits: int = 4
    group_size: int = 64
    sym: bool = False

    def __post_init__(self) -> None:
        for name in ("bits", "group_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise PlanError(f"{name} must be a whole number, not {value!r}")
        if not isinstance(self.sym, bool):
            raise PlanError(f"sym must be true or false, not {self.sym!r}")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise PlanError(f"bits must be {MIN_BITS} to {MAX_BITS}, not {self.bits}")
        if self.group_size != WHOLE_ROW and self.group_size < 1:
            raise PlanError(
                f"group_size must be positive, or -1 for the whole row, not {self.group_size}"
            )

    def group_length(self, in_features: int) -> int:
        """Inputs per group of a matrix with ``in_features`` inputs."""
        return in_features if self.group_size == WHOLE_ROW else self.group_size

    def divides(self, in_features: int) -> bool:
        """Whether groups tile ``in_features`` exactly."""
        return in_features % self.group_length(in_features) == 0


def nearest_group_sizes(in_features: int, group_size: int, count: int = 3) -> list[int]:
    """The ``count`` divisors of ``in_features`` nearest to ``group_size``, ascending."""
    divisors = [d for d in range(1, in_features + 1) if in_features % d == 0]
    return sorted(sorted(divisors, key=lambda d: abs(d - group_size))[:count])


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a ``value`` of field ``name`` that is not one of ``choices``.

    Raises:
        PlanError: names the choices.
    """
    if value not in choices:
        raise PlanError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
