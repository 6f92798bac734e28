"""Write docs/results.md from the comparisons in benchmarks/results.

A table is a run of `quantine compare`: repeat the command above it, copy its comparison.json to
benchmarks/results/NAME.json, and run this again. Texts are files, as `quantine eval` reads them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from quantine.comparison.table import markdown

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results.md"


@dataclass(frozen=True)
class Table:
    """One comparison and what it is held against.

    Attributes:
        name: of its file in benchmarks/results.
        title: heading.
        claim: what the paper says, and how its table is laid out.
        command: that made it.
        limits: what the table cannot show.
    """

    name: str
    title: str
    claim: str
    command: str
    limits: str


TABLES = (
    Table(
        "spqr-opt-mini",
        "SpQR: size against quality, with GPTQ and RTN",
        """SpQR (tables 1 and 2): at equal size, outliers in 16 bit beside small groups with
quantized statistics lose less than GPTQ, which loses less than rounding to nearest (RTN); with
about 4.6 bits less than 1% is lost.""",
        "quantine compare opt-mini --plans preset:rtn:bits=4,preset:rtn:bits=3,preset:gptq:bits=4,"
        "preset:gptq:bits=3,preset:spqr-4bit,preset:spqr-3bit "
        "--calibration wikitext2_valid.txt --samples 32 --seqlen 256 --bfloat16 "
        "--text wikitext2_test.txt --window 256 --limit 256 --out spqr",
        """opt-mini is an OPT of 6 blocks, 256 wide, trained on little text. It has no outliers to
speak of, so all methods are close at 4 bits, and their order in perplexity is mostly noise; KL
orders them. Times and tokens/s were taken while others used the machine: compare no closer than
by a factor of three.""",
    ),
    Table(
        "budgets-demo",
        "AdaDim and SpQR: axes, outliers and widths chosen by a budget",
        """AdaDim (section 3.2) lets each layer choose the axis that its groups run along. Under a
budget the choice is between axes, widths, group sizes and thresholds of outliers (SpQR) at once, by
what it changes in the model's predictions.""",
        "quantine compare demo --plans 3.65:both_axes=true,4.25:both_axes=true,3.3:both_axes=true,"
        "4.7:both_axes=true,3.3,4.9 --calibration wikitext2_valid.txt --samples 32 --seqlen 512 "
        "--bfloat16 --text wikitext2_test.txt,c4_en_validation_500.jsonl --window 1024 --limit 24 "
        "--out budgets",
        """Both axes leave 6% less divergence than one at 3.3 bits. Times and tokens/s were taken
while others used the machine, and before groups along outputs had native products: those rows'
tokens/s are of decoding by PyTorch. All matrices inside of blocks are packed; table and head are
not.""",
    ),
)

ROUNDED = "activations-opt-mini-outlier-all"
"""Name of the file of `benchmarks/activations.py`."""
ACTIVATIONS = """
## RPTQ: activations in clusters of reordered channels

RPTQ (section 3): channels differ so much in range that one grid for all of them ruins most;
clusters of channels with similar ranges do not. Here is an OPT of 6 blocks, 256 wide, with
channel ranges as large OPT models have them: some channels are 3 to 100 times the others. One
site at a time is rounded to 4 bits, everything else is float; the squared change of the block's
output relative to its square, mean of two blocks:

```sh
python benchmarks/activations.py MODEL wikitext2_valid.txt --blocks 1 4 --json rounded.json
```

"""
UNFINISHED = """
Perplexity of the same model on 256 windows of 256 tokens of WikiText-2, calibrated on 128
segments of 256 tokens of its validation text: float 146.72, `--scheme W4A4-faithful` 146.96 ±
3.72. RPTQ's published code gives 147.29, and 225.2 with one static grid for each tensor. Other
schemes were not measured yet.
"""

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
    for table in TABLES:
        rows = json.loads((DATA / f"{table.name}.json").read_text(encoding="utf-8"))["rows"]
        parts.append(
            f"\n## {table.title}\n\n{table.claim}\n\n```sh\n{table.command}\n```\n\n"
            f"{markdown(rows)}\n{table.limits}\n"
        )
    return "".join([*parts, ACTIVATIONS, rounded(), UNFINISHED])


def rounded() -> str:
    """What rounding one site of activations does, by kind of grid."""
    found = json.loads((DATA / f"{ROUNDED}.json").read_text(encoding="utf-8"))
    lines = ["| | " + " | ".join(found["sites"]) + " |", "|---" * (len(found["sites"]) + 1) + "|"]
    for name, changes in found["changes"].items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.2e}" for value in changes) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
