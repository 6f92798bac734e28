"""Pictures for a page: all matrices at once, small enough to be read on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from quantine.report.plots.layer_data import LayerPicture
from quantine.report.plots.trends import TRENDS, Trend, curves_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH: Final = 5.2
"""Width in inches; more would be scaled down to illegible text on a phone."""
ROW: Final = 0.24
"""Height of a kind's row of tiles, in inches."""
ACROSS: Final = 3
"""Number of maps of outliers in a row."""
COLOURS: Final = "viridis"
"""Name of the colours of tiles."""
SHOWN: Final = ("output_error", "bits_per_weight")
"""Stems of the trends that a page shows."""


def layers_figure(layers: Sequence[LayerPicture]) -> Figure | None:
    """Error and bits of every matrix: a row for each kind, a column for each block.

    ``None`` if no matrix belongs to a block.
    """
    from matplotlib.figure import Figure

    trends = [t for t in TRENDS if t.stem in SHOWN and curves_of(t, layers)]
    if not trends:
        return None
    kinds = len(curves_of(trends[0], layers))
    height = len(trends) * (kinds * ROW + 1.0)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    for axes, trend in zip(
        figure.subplots(len(trends), 1, squeeze=False).flat, trends, strict=True
    ):
        _draw(figure, axes, trend, layers)
    return figure


def _draw(figure: Figure, axes: Axes, trend: Trend, layers: Sequence[LayerPicture]) -> None:
    curves = curves_of(trend, layers)
    blocks = sorted({block for found, _ in curves.values() for block in found})
    values = np.full((len(curves), len(blocks)), math.nan)
    for row, (places, numbers) in enumerate(curves.values()):
        for place, number in zip(places, numbers, strict=True):
            values[row, blocks.index(place)] = number
    log = trend.log and bool((values[~np.isnan(values)] > 0).all())
    mesh = axes.pcolormesh(values, cmap=COLOURS, norm="log" if log else "linear")
    axes.invert_yaxis()
    axes.set_yticks([row + 0.5 for row in range(len(curves))], [k.split(".")[-1] for k in curves])
    step = max(1, len(blocks) // 8)
    axes.set_xticks([n + 0.5 for n in range(0, len(blocks), step)], map(str, blocks[::step]))
    axes.tick_params(labelsize=8, length=0)
    axes.set_xlabel("block", fontsize=8)
    axes.set_title(
        trend.unit if trend.stem == "bits_per_weight" else "output error (%)", fontsize=9
    )
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, format="{x:.3g}")
    bar.ax.tick_params(labelsize=7, which="both")
    bar.ax.yaxis.set_minor_formatter("")


def thumbnails_figure(layers: Sequence[LayerPicture]) -> Figure | None:
    """Where the outliers of ``layers`` are, a small map each; ``None`` without any."""
    from matplotlib.figure import Figure

    mapped = [layer for layer in layers if layer.outliers is not None]
    if not mapped:
        return None
    down = -(-len(mapped) // ACROSS)
    figure = Figure(figsize=(WIDTH, down * 1.95), layout="constrained")
    panels = list(figure.subplots(down, ACROSS, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, layer in zip(panels, mapped, strict=False):
        assert layer.outliers is not None
        counts = layer.outliers.numpy()
        most = max(1.0, float(np.percentile(counts, 99.7)))
        axes.imshow(counts, cmap="inferno", vmax=most, aspect="auto", interpolation="nearest")
        title = layer.kind.split(".")[-1]
        place = "" if layer.block is None else f"block {layer.block}, "
        axes.set_title(
            f"{place}{title}\n{100 * (layer.outlier_share or 0.0):.3g}% of weights", fontsize=7
        )
    return figure
