"""How much text ranks the choices of a budget."""

from __future__ import annotations

import pytest

from quantine.budget.probe import probe_segments


@pytest.mark.parametrize(
    ("samples", "seqlen", "weighted", "wanted"),
    [
        (256, 512, False, 8),
        (256, 512, True, 64),
        (16, 512, True, 8),
        (4, 512, True, 4),
        (3, 9000, False, 1),
        (0, 512, True, 0),
    ],
)
def test_a_quarter_is_probed_where_all_has_gradients_and_else_as_much_as_ranks_choices(
    samples: int, seqlen: int, weighted: bool, wanted: int
) -> None:
    assert probe_segments(samples, seqlen, weighted) == wanted
