"""The grids that a budget chooses among, in docs/results.md."""

from __future__ import annotations

from results_tables import head, line, read

OTHER_GRIDS = "[other grids](#grids-that-a-budget-chooses-among)"
"""What rows of other tables say of grids."""
GRIDS = """
### Grids that a budget chooses among

Zero points that may be fractions, as codes of a second grid (SpQR, section 4.2), lose less than
whole ones in the range of codes, and take fewer bits: 3 or 4 instead of as many as a code has.
Groups of 32, and scales with more bits the more a code has, fill the gaps between widths. Matrices
of some blocks were predicted as a budget predicts them, with 1296 grids each, and for each width
the least loss was read off the lower convex hull, as its share of what the grids come to that
budgets had before, whole zero points in groups of 16 and 64:

```sh
python benchmarks/budget_choices.py demo mixed.txt --blocks 5 20 --blur 8
python benchmarks/budget_choices.py qwen2.5-coder-0.5b.gguf mixed.txt --blocks 4 --blur 16
```

"""
GRIDS_AFTER = """
"Built in" is what a budget chooses among since, 29 grids; without any one of them a width loses up
to 9%. Weights of both files lie on grids of 32 inputs, which groups of 32 and 16 could hit: so each
weight was first moved by a random number within one of their steps (`--blur`). Unmoved, the demo
model is flattered from 4 bits on; what its rows above say of 4.25 and 4.7 bits holds in part for
that reason.

opt-mini-outlier-all, which was trained and never rounded, is left with {low} instead of
{low_before} at 3.3 bits, but with {high} of {high_before} at 4.25 (`--both-axes --samples 32
--seqlen 256`, 96 windows of 256 tokens of WikiText-2).
"""
FILES = {"demo": "budget-choices-demo", "Qwen2.5-Coder-0.5B": "budget-choices-qwen"}
ROWS = ("built in", "whole zero points", "all")


def after() -> str:
    """What follows the table."""
    names = {"low": "3.3", "low_before": "3.3-before", "high": "4.25", "high_before": "4.25-before"}
    found = {}
    for name, file in names.items():
        (score,) = read(f"grids-opt-mini-outlier-all-{file}")["texts"].values()
        found[name] = f"{score['kl']:.5f}"
    return GRIDS_AFTER.format(**found)


def sections() -> list[str]:
    """All of it, in order."""
    lines = head(["model", "grids", *(f"{width}" for width in read(FILES["demo"])["widths"])])
    for model, file in FILES.items():
        shares = read(file)["shares"]
        lines += [line([model, name, *(f"{one:.3f}" for one in shares[name])]) for name in ROWS]
    return [GRIDS, "\n".join(lines) + "\n", after()]
