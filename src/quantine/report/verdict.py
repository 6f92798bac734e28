"""Whether a quantized model is good enough, by numbers that were measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from quantine.errors import PlanError
from quantine.eval.interval import FEWEST, t_quantile
from quantine.formats.directory import read_json, write_json, writing

RECOVERY: Final = "recovery"
"""Name of the floor under the share of the float model's quality."""
TOP1: Final = "top1"
"""Name of the floor under the share of equal most likely tokens."""
FLOOR_NAMES: Final = (RECOVERY, TOP1)
"""Names of all numbers that can have a floor."""
FLOORS: Final = "quantine_floors.json"
"""Name of the file of floors in a quantized directory."""


@dataclass(frozen=True)
class Check:
    """One measured number against its floor.

    Attributes:
        name: what was measured, on which text or task.
        value: the number.
        low, high: its 95% interval, where there is one.
        floor: the least that is good enough.
    """

    name: str
    value: float
    floor: float
    low: float | None = None
    high: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the number reaches the floor."""
        return self.value >= self.floor

    @property
    def sure(self) -> bool:
        """Whether the whole interval is on the same side of the floor."""
        if self.low is None or self.high is None:
            return False
        return self.low >= self.floor or self.high < self.floor


def floors_of(texts: Sequence[str]) -> dict[str, float]:
    """Floors by name, from texts such as ``recovery=0.98`` and ``top1=0.9``.

    Raises:
        PlanError: another name, or no share.
    """
    floors = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            floors[name] = float(number)
        except ValueError as error:
            raise PlanError(f"a floor looks like recovery=0.98, not {text!r}") from error
        if name not in FLOOR_NAMES or not 0 < floors[name] <= 2:
            raise PlanError(
                f"a floor is a share of {' or '.join(FLOOR_NAMES)}, such as recovery=0.98, "
                f"not {text!r}"
            )
    return floors


def keep_floors(directory: Path, floors: Mapping[str, float]) -> None:
    """Keep ``floors`` in ``directory``, so that whoever uploads it is held to them.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(directory):
        write_json(directory / FLOORS, dict(floors))


def kept_floors(directory: Path) -> dict[str, float]:
    """The floors that `keep_floors` kept in ``directory``; empty if there are none.

    Raises:
        OutputError, PlanError: the file is damaged.
    """
    path = directory / FLOORS
    kept = dict(read_json(path)) if path.is_file() else {}
    return floors_of([f"{name}={value}" for name, value in kept.items()])


def checks_of(scores: Mapping[str, Any], floors: Mapping[str, float]) -> list[Check]:
    """Every measured number that has a floor; each text and each task counts on its own.

    Args:
        scores: of `quantine.eval.evaluate.evaluate`.

    Raises:
        PlanError: nothing was measured that a floor speaks of.
    """
    checks = []
    for name, floor in floors.items():
        found = list(_recoveries(scores, floor) if name == RECOVERY else _agreements(scores, floor))
        if not found:
            raise PlanError(
                f"there is no {name} to compare with its floor: measure it with `quantine eval OUT "
                "--reference MODEL --record`"
            )
        checks += found
    return checks


def _recoveries(scores: Mapping[str, Any], floor: float) -> Iterator[Check]:
    """A check for the recovery of every text and task that has one."""
    for kind in ("texts", "tasks"):
        for name, found in scores[kind].items():
            if found["recovery"] is not None:
                bounds = found["recovery_low"], found["recovery_high"]
                yield Check(f"recovery on {name}", found["recovery"], floor, *bounds)


def _agreements(scores: Mapping[str, Any], floor: float) -> Iterator[Check]:
    """A check for the agreement on every text; it has an interval where windows are enough."""
    for name, found in scores["texts"].items():
        if found["top1"] is not None:
            value, error = found["top1"], found["top1_stderr"]
            check = Check(f"top-1 agreement on {name}", value, floor)
            if error is not None and found["windows"] >= FEWEST:
                reach = t_quantile(found["windows"] - 1) * error
                check = replace(check, low=value - reach, high=value + reach)
            yield check
