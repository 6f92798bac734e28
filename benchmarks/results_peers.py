"""Other programs' quantizers beside quantine in docs/results.md: bits against divergence.

    python benchmarks/results_peers.py docs/kl-per-bit.png

draws what the table says.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results_tables import head, line, read
from results_tuning import NEAREST_BY_BITS, TUNED_FROM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIKITEXT2, C4 = "wikitext2_test.txt", "c4_en_validation_500.jsonl"
AUTOROUND = "AutoRound 0.16.1, 200 iterations (a)"
LLAMA_CPP, GPTQ, UNTUNED, NEAREST = "llama.cpp, with importances", "GPTQ", "budget", "nearest"
PEERS = """
### What others reach

Everything below is judged by one evaluation on the same windows, and bits are those of the matrices
in blocks, from the files. "Nearest" is of each size the row of the [table of
tuning](#tuning-towards-the-float-model) with the least divergence on WikiText-2, of 128 to 512
segments. llama.cpp's quantizer gets the importances of 128 segments of the same text; rows of 576
inputs do not suit its types with a K, for which others stand in there. GPTQ is quantine's own, of
32 segments, as the untuned budgets are.

```sh
QUANTINE_LLAMA_CPP_PYTHON=... python benchmarks/peers.py demo mixed.txt \\
    wikitext2_test.txt,c4_en_validation_500.jsonl peers.json --work DIR
```

"""
PEERS_AFTER = """
![KL divergence on WikiText-2 against bits per weight](kl-per-bit.png)

(a) Tunes roundings by signed gradients (arXiv 2309.05516): groups of 64 with zero points, 128
segments of 512 tokens. W3 was dequantized by its own library on an H200 GPU; W4 is of the same two
texts as the rows of quantine, made on a CPU and imported by `benchmarks/against_autoround.py`. GPTQ
of llm-compressor and more types of llama.cpp, on other text, have tables below.
"""
UNEVEN = """
Levels at uneven distances, one table for all groups of a matrix, would take little off: with the
best table and the best range of each group out of 144, the squared error of rounding to nearest is
2 to 3% less at 2 bits, 3 to 6% at 3 and 3 to 7% at 4 than with even steps, in groups of 16 and 32
of three matrices each of blocks 3 and 15 of the demo model (Qwen2.5-Coder-0.5B: 2 to 3, 2 to 10 and
3 to 8%; independent normal weights: 2, 7 to 8, 5 to 8%). Extremes of so small groups are levels
anyway. Every kernel and format would need such tables, and no other engine reads them, so quantine
has none.
"""
TRELLIS = """
What a scalar grid does not reach are trellis codes after rotations, as in EXL3 (QTIP with LDLQ),
which quantine does not have. Published perplexities of Llama-3.2-1B-Instruct on WikiText-2, which
were read off a plot of the project and are good to 0.01 (float 14.22; other texts and contexts than
on this page):

| bits of the decoder | EXL3 | GPTQ in mixed widths (EXL2) | llama.cpp with importance matrix |
|---|---|---|---|
| 2.0 | 23.27 |  |  |
| 2.5 | 17.90 |  | IQ2_M, 2.68 bits: 23.14 |
| 3.0 | 15.42 | 21.38 | IQ3_XS, 3.27 bits: 17.16 |
| 3.5 | 14.87 | 16.53 | IQ3_M, 3.57 bits: 16.19 |
| 4.0 | 14.51 | 15.16 | IQ4_XS, 4.27 bits: 14.88 |

Where every bit counts, below 4, expect EXL3 to be the better one: its files take a GPU and its own
kernels. At 4 bits it is 2% above its float model there, a budget of 4.25 bits, untuned, 4% here.
"""


@dataclass(frozen=True)
class Point:
    """A quantized model: who made it, its size, and how far it is from the float model.

    Attributes:
        by: program or method.
        name: what it calls that size.
        bits: bits per weight of the matrices in blocks.
        scores: perplexity and KL divergence by text.
    """

    by: str
    name: str
    bits: float
    scores: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, by: str, row: dict[str, Any], name: str | None = None) -> Point:
        """A row of `quantine eval` or `quantine compare`."""
        scores = {text: (one["perplexity"], one["kl"]) for text, one in row["texts"].items()}
        return cls(by, name or row["name"], row["bits_per_weight"], scores)


def points() -> list[Point]:
    """All that was measured, by size."""
    found = [Point(AUTOROUND, "W3 g64", 3.297, {WIKITEXT2: (24.42, 0.2130), C4: (51.47, 0.3837)})]
    found.append(Point.of(AUTOROUND, read("autoround-demo-W4"), "W4 g64"))
    found += [Point.of(LLAMA_CPP, row) for row in read("peers-demo")]
    methods = {row["name"]: row for row in read("methods-demo")["rows"]}
    for bits in (3, 4):
        found.append(Point.of(GPTQ, methods[f"gptq,bits={bits},group_size=64"], f"{bits} bits g64"))
    budgets = read(TUNED_FROM)["rows"]
    found += [
        Point.of(UNTUNED, row, row["name"].partition(",")[0])
        for row in budgets
        if "both_axes" in row["name"]
    ]
    found += [Point.of(NEAREST, read(file), bits) for bits, file in NEAREST_BY_BITS.items()]
    return sorted(found, key=lambda point: point.bits)


def peers() -> str:
    """Perplexities and divergences of all, from small to large."""
    lines = head(
        [
            "by",
            "size",
            "bits per weight",
            *(f"{t} {s}" for t in (WIKITEXT2, C4) for s in ("perplexity", "KL")),
        ]
    )
    for point in points():
        cells = []
        for text in (WIKITEXT2, C4):
            perplexity, kl = point.scores.get(text, (None, None))
            cells += [
                "" if perplexity is None else f"{perplexity:.2f}",
                "" if kl is None else f"{kl:.4f}",
            ]
        by = f"**quantine, {point.by}**" if point.by in (UNTUNED, NEAREST) else point.by
        lines.append(line([by, point.name, f"{point.bits:.3f}", *cells]))
    return "\n".join(lines) + "\n"


def sections() -> list[str]:
    """All of it, in order."""
    return [PEERS, peers(), PEERS_AFTER, UNEVEN, TRELLIS]


def draw(file: Path) -> None:
    """Write the picture of divergences on WikiText-2."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    _draw_series(axes, NEAREST, "quantine, nearest", "#1b3a6b", "-o")
    _draw_series(axes, UNTUNED, "quantine, budget", "#5b86c4", "-o")
    _draw_series(axes, GPTQ, "GPTQ, groups of 64", "#8c8c8c", "s")
    _draw_series(axes, LLAMA_CPP, LLAMA_CPP, "#b5651d", "^")
    _draw_series(axes, AUTOROUND, "AutoRound", "#7a3b7a", "D")
    axes.set_yscale("log")
    axes.set_ylabel("KL divergence from float, nats per token", fontsize=9)
    axes.set_xlabel("bits per weight of the matrices in blocks", fontsize=9)
    axes.tick_params(labelsize=8, which="both")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}")
    axes.margins(x=0.1)
    axes.grid(visible=True, color="#eeeeee", linewidth=0.6, zorder=0)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=150, metadata={"Software": None})


def _draw_series(axes: Axes, by: str, label: str, colour: str, style: str) -> None:
    chosen = [point for point in points() if point.by == by]
    values = [point.scores[WIKITEXT2][1] for point in chosen]
    sizes = [point.bits for point in chosen]
    axes.plot(sizes, values, style, color=colour, label=label, markersize=5, linewidth=1.3)
    if by == LLAMA_CPP:
        for point, value in zip(chosen, values, strict=True):
            axes.annotate(
                point.name, (point.bits, value), (5, 3), textcoords="offset points", fontsize=7
            )


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
