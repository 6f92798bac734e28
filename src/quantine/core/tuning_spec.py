"""`Tuning`, which says how long and how fast a quantized model is tuned."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

from quantine.errors import PlanError, shown

MOST_STEPS: Final = 100_000
"""Largest number of steps accepted."""


@dataclass(frozen=True)
class Tuning:
    """How the numbers of a quantized model that are not codes are tuned by gradient.

    Attributes:
        steps: number of steps, each of which changes all numbers once.
        segments: segments of calibration text whose gradients one step averages.
        rate: largest change of a scale in one step, as a share of it; other numbers change in
            proportion, see `quantine.tuning.numbers`.

    Raises:
        PlanError: a field has a value that is not allowed.
    """

    steps: int = 32
    segments: int = 4
    rate: float = 1e-3

    def __post_init__(self) -> None:
        for name, most in (("steps", MOST_STEPS), ("segments", MOST_STEPS)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise PlanError(f"tune: {name} must be 1 to {most}, not {shown(value)}")
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float):
            raise PlanError(f"tune: rate must be a number, not {shown(self.rate)}")
        if not 0 < self.rate <= 0.1:
            raise PlanError(f"tune: rate must be above 0 and at most 0.1, not {self.rate}")

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold; `tuning_from` turns them back."""
        return dataclasses.asdict(self)


SETTINGS: Final = {
    "quick": Tuning(),
    "long": Tuning(steps=64, segments=8),
}
"""Named settings: minutes, and some more minutes, for a small model on two cores."""


def tuning_from(value: Any, where: str) -> Tuning | None:
    """Build a `Tuning` from plain values, such as those of a plan file.

    Args:
        value: a name in `SETTINGS`, or a mapping from field names to values; ``None`` for none.
        where: the place of ``value``, named in errors.

    Raises:
        PlanError: an unknown name or key, or a value that is not allowed.
    """
    if value is None:
        return None
    if isinstance(value, str):
        if value not in SETTINGS:
            raise PlanError(f"{where}: tune must be one of {', '.join(SETTINGS)}, not {value!r}")
        return SETTINGS[value]
    names = [field.name for field in dataclasses.fields(Tuning)]
    if not isinstance(value, dict) or set(value) - set(names):
        raise PlanError(f"{where}: tune must be a mapping with keys among {', '.join(names)}")
    return Tuning(**value)
