"""What the stages of a run took, from its report: the longest first."""

from __future__ import annotations

from typing import Any, Final

OTHER: Final = "other"
"""What the time is called that no stage has, such as that in which the program starts."""
SHORTEST: Final = 0.02
"""Share of the run below which a stage is not named in a line."""


def stage_rows(report: dict[str, Any]) -> list[tuple[str, float]]:
    """Stages and their seconds by the clock, the longest first, then `OTHER`.

    Empty for directories that were not quantized here, or by a version that timed no stages.
    """
    run = report["run"]
    stages = [(name, spent["seconds"]) for name, spent in run.get("stages", {}).items()]
    if not stages:
        return []
    rest = run["seconds"] - sum(seconds for _, seconds in stages)
    return [*sorted(stages, key=lambda stage: -stage[1]), (OTHER, max(0.0, rest))]


def stage_line(report: dict[str, Any]) -> str:
    """The seconds of the longest stages in one line, with those of all shorter ones together."""
    rows = stage_rows(report)
    least = SHORTEST * report["run"]["seconds"]
    named = [(name, seconds) for name, seconds in rows if name != OTHER and seconds >= least]
    rest = sum(seconds for _, seconds in rows) - sum(seconds for _, seconds in named)
    shown = (f"{name} {seconds:.1f}" for name, seconds in [*named, (OTHER, rest)])
    return f"seconds by stage: {', '.join(shown)}"
