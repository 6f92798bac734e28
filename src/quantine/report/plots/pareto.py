"""The picture of a comparison: quality against size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE: Final = (7.0, 4.6)
"""Width and height of the picture in inches."""
FRONT: Final = "#1b3a6b"
"""Colour of plans that no other beats."""
BEHIND: Final = "#8c8c8c"
"""Colour of plans that another beats."""
WITHIN: Final = 1.01
"""Perplexity over the float model's that counts as nearly lossless (SpQR, section 5)."""


def pareto_figure(points: Sequence[tuple[str, float, float]], front: Sequence[str]) -> Figure:
    """Perplexity over the float model's against bits per weight.

    Args:
        points: name, bits per weight, and ratio of perplexities of each plan.
        front: names of those that no other beats; they are joined by a line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    best = sorted((bits, ratio) for name, bits, ratio in points if name in front)
    axes.plot(*zip(*best, strict=True), color=FRONT, linewidth=1.4, zorder=2)
    for name, bits, ratio in points:
        colour = FRONT if name in front else BEHIND
        axes.plot([bits], [ratio], "o", color=colour, markersize=5, zorder=3)
        axes.annotate(
            name, (bits, ratio), (5, 4), textcoords="offset points", fontsize=7, color=colour
        )
    axes.axhline(WITHIN, linestyle="--", color=BEHIND, linewidth=0.8)
    axes.annotate(
        "1% above float",
        (1, WITHIN),
        (-3, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=7,
        color=BEHIND,
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}")
    axes.tick_params(labelsize=8, which="both")
    axes.set_xlabel("bits per weight, counted from the files", fontsize=9)
    axes.set_ylabel("perplexity / the float model's", fontsize=9)
    axes.margins(x=0.12, y=0.12)
    axes.grid(visible=True, color="#eeeeee", linewidth=0.6, zorder=0)
    return figure


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write ``figure`` as ``path.svg`` and ``path.png``, and return these paths."""
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("svg", "png")]
    figure.savefig(files[0], metadata={"Date": None})
    figure.savefig(files[1], dpi=150)
    return files
