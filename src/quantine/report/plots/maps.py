"""The picture of one matrix: where it is sensitive, and where its outliers are.

Drawn as in figure 2 of SpQR (arXiv 2306.03078): rows are outputs, columns inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from quantine.report.plots.layer_data import LayerPicture, readable_map
from quantine.statistics.sensitivity_map import cell_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL: Final = 4.6
"""Width of a panel in inches."""
HEIGHT: Final = 4.3
"""Height of the figure in inches."""
COLOURS: Final = "inferno"
"""Name of colours that rise evenly from dark to light, and so read in grey, too."""
UNTOUCHED: Final = "#7f7f7f"
"""Colour of cells without a sensitivity: neither bright nor dark."""
SENSITIVE: Final = (1.0, 99.7)
"""Percentiles of a sensitivity map that get the ends of the colours."""
CROWDED: Final = 99.7
"""Percentile of an outlier map that gets the brightest colour."""
MOST_STEPS: Final = 4
"""Largest number of ticks of an axis besides that at zero: text takes most of the time to draw."""


def has_map(layer: LayerPicture) -> bool:
    """Whether there is anything to draw about ``layer``."""
    return layer.sensitivity is not None or layer.outliers is not None


class MapFigure:
    """A figure that shows one matrix after another: building figures takes long, changing does not.

    Sensitivity and outliers are side by side, or alone where the other is missing.

    Args:
        layer: the first matrix; all others have its `kind`.
    """

    def __init__(self, layer: LayerPicture) -> None:
        from matplotlib.figure import Figure

        titles = []
        if layer.sensitivity is not None:
            titles.append("log10 of the mean in a cell (½ squared output per token)")
        if layer.outliers is not None:
            titles.append("outliers in a cell (% of its weights)")
        self.figure: Figure = Figure(figsize=(PANEL * len(titles), HEIGHT))
        self._title = self.figure.suptitle("", fontsize=11, y=0.975)
        self._panels = [
            _Panel(self.figure, place, 1 / len(titles), layer.shape, unit)
            for place, unit in enumerate(titles)
        ]
        self.show(layer)

    @staticmethod
    def kind(layer: LayerPicture) -> tuple[tuple[int, int], bool, bool]:
        """What matrices that share a figure have in common."""
        return layer.shape, layer.sensitivity is not None, layer.outliers is not None

    def show(self, layer: LayerPicture) -> None:
        """Change the figure to show ``layer``, whose `kind` is that of the first."""
        rows, columns = layer.shape
        self._title.set_text(f"{layer.name}   {rows} by {columns}")
        panels = iter(self._panels)
        if layer.sensitivity is not None:
            next(panels).show("weight sensitivity", *_sensitivity(layer))
        if layer.outliers is not None:
            next(panels).show(
                f"outliers: {100 * (layer.outlier_share or 0.0):.3g}% of weights", *_density(layer)
            )


class _Panel:
    """A map with its colour bar, in a part of a figure."""

    def __init__(
        self, figure: Figure, place: int, width: float, shape: tuple[int, int], unit: str
    ) -> None:
        from matplotlib import colormaps

        rows, columns = shape
        left = (place + 0.16 - 0.03 * place) * width
        colours = colormaps[COLOURS].with_extremes(bad=UNTOUCHED)
        self._axes = figure.add_axes((left, 0.12, 0.62 * width, 0.74))
        self._image = self._axes.imshow(
            [[0.0]],
            cmap=colours,
            extent=(0, columns, rows, 0),
            aspect="auto",
            interpolation="none",
        )
        self._axes.set(xlabel="input", xticks=_ticks(columns), yticks=_ticks(rows))
        if place == 0:
            self._axes.set_ylabel("output")
        else:
            self._axes.set_yticklabels([])
        # Places given, not found from the sizes of other texts, save a third of the time.
        self._axes.xaxis.set_label_coords(0.5, -0.09)
        self._axes.yaxis.set_label_coords(-0.16, 0.5)
        bar = figure.add_axes((left + 0.64 * width, 0.12, 0.03 * width, 0.74))
        # An image, where matplotlib's own colour bar has a path for each of 256 colours.
        self._ramp = bar.imshow(
            np.linspace(1, 0, 256)[:, np.newaxis],
            cmap=COLOURS,
            aspect="auto",
            interpolation="none",
        )
        bar.set(xticks=[], ylabel=unit)
        bar.yaxis.tick_right()
        bar.yaxis.set_label_coords(6.5, 0.5)
        bar.locator_params(axis="y", nbins=MOST_STEPS)
        self._bar: Axes = bar
        for axes in (self._axes, bar):
            axes.tick_params(labelsize=8)
            axes.xaxis.label.set_fontsize(9)
            axes.yaxis.label.set_fontsize(9)

    def show(self, title: str, values: Any, low: float, high: float) -> None:
        """Show ``values`` ``[rows, columns]``, with colours from ``low`` to ``high``."""
        self._axes.set_title(title, fontsize=10, y=1.0)
        self._image.set_data(values)
        self._image.set_clim(low, high)
        self._ramp.set_extent((0, 1, low, high))
        self._bar.set_ylim(low, high)


def _sensitivity(layer: LayerPicture) -> tuple[Any, float, float]:
    """The map to draw, and the ends of its colours."""
    values = np.ma.masked_invalid(readable_map(layer).numpy())
    known = values.compressed()
    if not len(known):
        return values, -1.0, 0.0
    low, high = np.percentile(known, SENSITIVE)
    return values, float(low), float(max(high, low + 0.1))


def _density(layer: LayerPicture) -> tuple[Any, float, float]:
    """Percentage of outliers in each cell, and the ends of its colours."""
    assert layer.outliers is not None
    counts = layer.outliers.numpy()
    rows, columns = (
        cell_of(length, cells).bincount().numpy()
        for length, cells in zip(layer.shape, counts.shape, strict=True)
    )
    share = counts * 100 / np.outer(rows, columns)
    return share, 0.0, float(np.percentile(share, CROWDED) or share.max())


def _ticks(length: int) -> list[int]:
    """Multiples of a power of two, as the sizes of attention heads are."""
    step = 1
    while length > step * MOST_STEPS:
        step *= 2
    return list(range(0, length + 1, step))
