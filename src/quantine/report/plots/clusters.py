"""The picture of a block's channels in clusters of alike ranges.

Drawn after figure 1 of RPTQ (arXiv 2304.01089): channels as points, and side by side before and
after they are reordered.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from torch import Tensor

from quantine.core.activation_spec import REORDERS
from quantine.report.plots.layer_data import read_maps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH: Final = 9.6
"""Width of the picture in inches."""
HEIGHT: Final = 1.9
"""Height of a row of panels in inches."""
COLOURS: Final = "turbo"
"""Name of the colours that tell clusters apart."""
TITLES: Final = {
    "R1": ("norm before attention",),
    "R2": ("queries", "keys"),
    "R3": ("values",),
    "R4": ("norm before the MLP",),
    "R5": ("hidden",),
}
"""Tensors that have the ranges of a reorder, by its name; each is a row of panels."""
HEADS: Final = ("largest, smallest", "in the model's order", "by cluster")
"""Titles of the columns of panels."""
LOGARITHMIC_FROM: Final = 5.0
"""Least value, in usual widths of a range, that makes a scale logarithmic."""
SIDE: Final = 3
"""Area of the mark of a channel, in points squared."""

Blocks = dict[str, dict[str, Tensor]]
"""Maps by a block's path and reorder: see `quantine.rptq.reordering.Reordering.maps`."""


def read_clusters(directory: Path) -> Blocks:
    """The clusters that quantizing recorded in ``directory``; empty where nothing is reordered.

    Raises:
        FormatError: the file of maps is damaged.
    """
    blocks: Blocks = {}
    for name, stored in read_maps(directory).items():
        path, _, kind = name.rpartition(".")
        if kind in REORDERS:
            blocks.setdefault(path, {})[kind] = stored
    return blocks


def clusters_figure(title: str, kinds: Mapping[str, Tensor], width: float = WIDTH) -> Figure:
    """The channels of a block, a row for each place where ranges were taken.

    Args:
        title: of the figure.
        kinds: by reorder, see `quantine.rptq.reordering.Reordering.maps`.
        width: in inches.
    """
    from matplotlib.figure import Figure

    rows = [
        (f"{kind}: {place}", found[:, 2 * at], found[:, 2 * at + 1], found[:, -1])
        for kind, found in sorted(kinds.items())
        for at, place in enumerate(TITLES[kind])
    ]
    figure = Figure(figsize=(width, HEIGHT * len(rows) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(rows), len(HEADS), squeeze=False)
    for panels, (name, high, low, labels) in zip(grid, rows, strict=True):
        count = int(labels.max()) + 1
        panels[0].set_ylabel(f"{name}\n{count} clusters", fontsize=8)
        _draw(panels, high.numpy(), low.numpy(), labels.numpy())
    for axes, head in zip(grid[0], HEADS, strict=True):
        axes.set_title(head, fontsize=9)
    grid[-1][0].set_xlabel("largest", fontsize=8)
    for axes in grid[-1][1:]:
        axes.set_xlabel("channel", fontsize=8)
    return figure


def _draw(panels: Any, high: Any, low: Any, labels: Any) -> None:
    """Draw a row of panels: points, ranges in the model's order, and ranges by cluster."""
    # Neighbours in number are not neighbours in range: colours follow the ranges' widths.
    widths = [np.max(high[labels == label] - low[labels == label]) for label in np.unique(labels)]
    ranks = np.argsort(np.argsort(widths)) / max(1, len(widths) - 1)
    shades = ranks[np.searchsorted(np.unique(labels), labels)]
    points, ranges, ordered = panels
    points.scatter(high, low, c=shades, s=SIDE, cmap=COLOURS, rasterized=len(high) > 2000)
    order = np.argsort(labels, kind="stable")
    _draw_ranges(ranges, high, low, shades)
    _draw_ranges(ordered, high[order], low[order], shades[order])
    for axes in panels:
        axes.tick_params(labelsize=7)
    usual = float(np.median(high - low))
    if usual > 0 and max(high.max(), -low.min()) > LOGARITHMIC_FROM * usual:
        # Channels of very different ranges are to be seen in one panel; ticks are powers of ten,
        # of which there must be one.
        linear, ends = 10.0 ** np.ceil(np.log10(usual)), np.concatenate([high, low])
        for scale, axis, values in (
            (points.set_xscale, points.xaxis, high),
            (points.set_yscale, points.yaxis, low),
            (ranges.set_yscale, ranges.yaxis, ends),
            (ordered.set_yscale, ordered.yaxis, ends),
        ):
            if np.abs(values).max() > linear:
                scale("symlog", linthresh=linear)
                axis.set_major_formatter("{x:g}")


def _draw_ranges(axes: Axes, high: Any, low: Any, shades: Any) -> None:
    """Draw a vertical line for each channel, from its least to its greatest value."""
    from matplotlib import colormaps

    axes.vlines(
        np.arange(len(high)),
        low,
        high,
        colors=colormaps[COLOURS](shades),
        linewidth=0.6,
        rasterized=True,
    )
    axes.set_xlim(-0.5, len(high) - 0.5)
