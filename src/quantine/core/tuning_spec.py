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
    """How a quantized model is tuned by gradient: its blocks with codes, then the whole without.

    Attributes:
        steps: number of steps of the whole model, each of which changes all numbers once.
        segments: segments of calibration text whose gradients one step averages.
        rate: largest change of a scale in one step, as a share of it; other numbers change in
            proportion, see `quantine.tuning.numbers`. Blocks move twice as fast.
        block_steps: number of steps of each block, which also change codes; 0 leaves codes as they
            were solved.

    Raises:
        PlanError: a field has a value that is not allowed.
    """

    steps: int = 16
    segments: int = 4
    rate: float = 1e-3
    block_steps: int = 60

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("segments", 1), ("block_steps", 0)):
            value, most = getattr(self, name), MOST_STEPS
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise PlanError(f"tune: {name} must be {least} to {most}, not {shown(value)}")
        if isinstance(self.rate, bool) or not isinstance(self.rate, int | float):
            raise PlanError(f"tune: rate must be a number, not {shown(self.rate)}")
        if not 0 < self.rate <= 0.1:
            raise PlanError(f"tune: rate must be above 0 and at most 0.1, not {self.rate}")

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold; `tuning_from` turns them back."""
        return dataclasses.asdict(self)


SETTINGS: Final = {
    "quick": Tuning(),
    "long": Tuning(segments=8),
    "whole": Tuning(block_steps=0, steps=64),
}
"""Named settings: minutes, and twice as many of them, for a small model on two cores; and the whole
alone, for models whose matrices made up for errors before them while they were solved."""


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
