"""Write docs/results.md from the comparisons in benchmarks/results.

A table is a run of `quantine compare`: repeat the command above it, copy its comparison.json to
benchmarks/results/NAME.json, and run this again. Texts are files, as `quantine eval` reads them.
"""

from __future__ import annotations

from pathlib import Path

import results_activations as activations
import results_comparisons as comparisons
import results_engines as engines
import results_experts as experts
import results_grids as grids
import results_peers as peers
import results_tuning as tuning

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
AXES_BEFORE = "spqr-opt-mini"
"""The comparison that the table of axes follows."""
INTRODUCTION = """# Results

What the papers claim, measured again with quantine on the models at hand. This page is written by
[benchmarks/results.py](../benchmarks/results.py) from JSON; the command that made a table is above
it. Perplexities of small models on short texts are not those of the papers: read the order of rows
and the recovery, not the level.

What the models at hand cannot show: anything about models with billions of weights, whose outliers
SpQR, AdaDim and RPTQ are made for; and scores of tasks that small models only guess at.
"""


def page() -> str:
    """The page, from all comparisons."""
    parts = [INTRODUCTION]
    for table in comparisons.TABLES:
        parts.append(comparisons.section(table))
        if table.name == AXES_BEFORE:
            parts += [comparisons.AXES, comparisons.axes(), comparisons.AXES_AFTER]
        if table.name == comparisons.QWEN:
            parts += [comparisons.BY_LOSS, comparisons.by_loss(), comparisons.BY_LOSS_AFTER]
        if table.name == tuning.TUNED_FROM:
            parts += [*tuning.sections(), *grids.sections(), *peers.sections()]
    return "".join(
        [*parts, experts.EXPERTS, experts.experts(), *activations.sections(), *engines.sections()]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
