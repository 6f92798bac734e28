"""The picture of one matrix: where it is sensitive, and where its outliers are.

Both are drawn as in figure 2 of SpQR (arXiv 2306.03078): rows are outputs, columns inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from quantine.plots.data import LayerPicture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL: Final = 4.6
"""Width of a panel in inches."""
HEIGHT: Final = 4.4
COLOURS: Final = "inferno"
"""Rises evenly from dark to light, so it reads in grey."""
UNTOUCHED: Final = "#7f7f7f"
"""Colour of cells without a sensitivity: neither bright nor dark."""
RANGE: Final = (1.0, 99.5)
"""Percentiles of a sensitivity map that get the ends of the colours."""
MOST_TICKS: Final = 8


def has_map(layer: LayerPicture) -> bool:
    """Whether there is anything to draw about ``layer``."""
    return layer.sensitivity is not None or layer.outliers is not None


def map_figure(layer: LayerPicture) -> Figure:
    """Sensitivity and outliers side by side, or the one that there is."""
    from matplotlib.figure import Figure

    panels = [
        draw
        for draw, value in ((_sensitivity, layer.sensitivity), (_outliers, layer.outliers))
        if value is not None
    ]
    figure = Figure(figsize=(PANEL * len(panels), HEIGHT))
    figure.suptitle(f"{layer.name}  ({layer.shape[0]} × {layer.shape[1]})", fontsize=11)
    width = 1 / len(panels)
    for place, draw in enumerate(panels):
        left = place * width
        axes = figure.add_axes((left + 0.16 * width, 0.12, 0.62 * width, 0.72))
        bar = figure.add_axes((left + 0.80 * width, 0.12, 0.03 * width, 0.72))
        draw(axes, bar, layer)
    return figure


def _sensitivity(axes: Axes, bar: Axes, layer: LayerPicture) -> None:
    assert layer.sensitivity is not None
    values = np.ma.masked_invalid(layer.sensitivity.numpy())
    known = values.compressed()
    low, high = np.percentile(known, RANGE) if len(known) else (-1.0, 0.0)
    _draw_map(axes, bar, layer, values, (float(low), float(max(high, low + 0.1))))
    axes.set_title("weight sensitivity", fontsize=10)
    bar.set_ylabel("log10 of mean sensitivity (½ squared output per token)", fontsize=8)


def _outliers(axes: Axes, bar: Axes, layer: LayerPicture) -> None:
    assert layer.outliers is not None
    counts = layer.outliers.numpy()
    share = counts / _cell_weights(layer.shape, counts.shape) * 100
    _draw_map(axes, bar, layer, share, (0.0, float(np.percentile(share, RANGE[1]) or share.max())))
    assert layer.outlier_share is not None
    axes.set_title(f"outliers: {layer.outlier_share:.2%} of weights", fontsize=10)
    bar.set_ylabel("outliers in a cell (% of its weights)", fontsize=8)


def _draw_map(
    axes: Axes, bar: Axes, layer: LayerPicture, values: Any, limits: tuple[float, float]
) -> None:
    from matplotlib import colormaps

    rows, columns = layer.shape
    colours = colormaps[COLOURS].with_extremes(bad=UNTOUCHED)
    image = axes.imshow(
        values,
        cmap=colours,
        vmin=limits[0],
        vmax=limits[1],
        extent=(0, columns, rows, 0),
        aspect="auto",
        interpolation="none",
    )
    axes.set_xticks(_ticks(columns))
    axes.set_yticks(_ticks(rows))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("input", fontsize=9)
    axes.set_ylabel("output", fontsize=9)
    assert axes.figure is not None
    axes.figure.colorbar(image, cax=bar)
    bar.tick_params(labelsize=8)


def _ticks(length: int) -> list[int]:
    """Multiples of a power of two, as heads are."""
    step = 1
    while length > step * MOST_TICKS:
        step *= 2
    return list(range(0, length + 1, step))


def _cell_weights(shape: tuple[int, int], cells: tuple[int, ...]) -> Any:
    """Weights in each cell of a map."""
    from quantine.core.sensitivity import cell_of

    rows, columns = (
        cell_of(length, count).bincount().numpy()
        for length, count in zip(shape, cells, strict=True)
    )
    return np.outer(rows, columns)
