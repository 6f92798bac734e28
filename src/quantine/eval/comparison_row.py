"""A row of a comparison: one model, and how it scored."""

from __future__ import annotations

import math
from typing import Any, Final

Row = dict[str, Any]
"""What `quantine.comparison.run.compare` returns for each model."""
COMPARISON_STEM: Final = "comparison"
"""Name of the files of a comparison's table, without suffix."""


def loss_of_quality(row: Row) -> float | None:
    """Perplexity over the float model's, the geometric mean over texts; ``None`` without texts."""
    recoveries = [text["recovery"] for text in row["texts"].values()]
    if not recoveries or not all(recoveries):
        return None
    return math.exp(-sum(map(math.log, recoveries)) / len(recoveries))
