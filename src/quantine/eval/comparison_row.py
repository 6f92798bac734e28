"""The rows of a comparison of several models, and the loss of quality that they are ranked by."""

from __future__ import annotations

import math
from typing import Any, Final

Row = dict[str, Any]
"""One model of a comparison and its measurements, as `quantine.comparison.run.compare` has them."""
COMPARISON_STEM: Final = "comparison"
"""Name, without suffix, of the files that hold a comparison's table."""


def loss_of_quality(row: Row) -> float | None:
    """The model's perplexity divided by the float model's, as the geometric mean over texts.

    1 is no loss, larger is worse. ``None`` without texts, or where a text has no recovery or one of
    zero.
    """
    recoveries = [text["recovery"] for text in row["texts"].values()]
    if not recoveries or not all(recoveries):
        return None
    return math.exp(-sum(map(math.log, recoveries)) / len(recoveries))
