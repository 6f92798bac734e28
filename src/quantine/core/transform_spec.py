"""`Rotate`, which asks for a model whose hidden states are rotated before it is quantized."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

from quantine.errors import PlanError, shown

ROTATE: Final = "rotate"
"""Name of the transform in plans."""
MOST_SEED: Final = 2**63 - 1
"""Largest seed."""


@dataclass(frozen=True)
class Rotate:
    """A rotation of hidden states, and of the values of each head, folded into the weights.

    Attributes:
        seed: of the random signs of the rotation.

    Raises:
        PlanError: the seed is not allowed.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        seed = self.seed
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MOST_SEED:
            raise PlanError(f"{ROTATE}: seed must be 0 to {MOST_SEED}, not {shown(seed)}")

    def as_plain(self) -> dict[str, Any]:
        """The transform as a plain value that JSON can hold; `transforms_from` turns it back."""
        return {ROTATE: dataclasses.asdict(self)}


def transforms_from(value: Any, where: str) -> tuple[Rotate, ...]:
    """Read ``transforms`` of a plan.

    Args:
        value: a list with at most one entry, ``"rotate"`` or ``{"rotate": {"seed": 0}}``; ``None``
            stands for an empty one.
        where: the place of ``value``, named in errors.

    Raises:
        PlanError: another value, or one that is not allowed.
    """
    if value is None:
        return ()
    wrong = PlanError(f"{where}: transforms must be [{ROTATE}], or [{{{ROTATE}: {{seed: 0}}}}]")
    if not isinstance(value, list) or len(value) > 1:
        raise wrong
    found = []
    for one in value:
        fields = {} if one == ROTATE else one.get(ROTATE) if isinstance(one, dict) else None
        if not isinstance(fields, dict) or set(fields) - {"seed"}:
            raise wrong
        if isinstance(one, dict) and len(one) > 1:
            raise wrong
        found.append(Rotate(**fields))
    return tuple(found)
