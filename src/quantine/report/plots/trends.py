"""Pictures of a whole model: how one number goes from block to block, for each kind of matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from quantine.report.plots.layer_data import LayerPicture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS: Final = 4
"""Largest number of panels in a row."""
PANEL: Final = (2.5, 2.2)
"""Size of a panel in inches."""
MARGIN: Final = (0.75, 0.95)
"""Inches for labels at the left, and for title and labels above and below."""
OWN: Final = "#1b3a6b"
"""Colour of the kind that a panel is about."""
OTHERS: Final = "#cccccc"
"""Colour of all other kinds, which are behind it to compare."""
MARKED: Final = 40
"""Largest number of blocks that each get a marker."""


@dataclass(frozen=True)
class Trend:
    """A number that every layer has, and how its picture is drawn.

    Attributes:
        stem: of the file names.
        title: of the figure.
        unit: label of the vertical axis.
        field: attribute of `LayerPicture`.
        factor: what the attribute is multiplied with to be in ``unit``.
        log: the vertical axis is logarithmic.
        missing: why there may be no such number.
    """

    stem: str
    title: str
    unit: str
    field: str
    factor: float = 1.0
    log: bool = False
    missing: str = ""

    def value(self, layer: LayerPicture) -> float | None:
        """The number of ``layer`` in ``unit``, ``None`` if it has none."""
        value = getattr(layer, self.field)
        return None if value is None else float(value) * self.factor


TRENDS: Final = (
    Trend(
        "outlier_share",
        "Outliers kept in 16 bit",
        "share of weights (%)",
        "outlier_share",
        100.0,
        missing="no layout here holds outliers",
    ),
    Trend(
        "output_error",
        "Squared error of the output, relative to the float layer's squared output",
        "error (%)",
        "output_error",
        100.0,
        log=True,
        missing="outputs were not measured: there was no calibration, or tuning came after it",
    ),
    Trend("bits_per_weight", "Size", "bits per weight", "bits_per_weight"),
)
"""The pictures of a whole model."""


def trend_figure(trend: Trend, layers: Sequence[LayerPicture]) -> Figure | None:
    """Small multiples, one for each kind of matrix; ``None`` if no layer has the number.

    Layers outside of blocks have no place on the axis: their numbers are written below.
    """
    from matplotlib.figure import Figure

    curves = curves_of(trend, layers)
    outside = [
        f"{layer.name}: {value:.4g}"
        for layer in layers
        if layer.block is None and (value := trend.value(layer)) is not None
    ]
    if not curves and not outside:
        return None
    down = max(1, -(-len(curves) // ACROSS))
    across = max(1, -(-len(curves) // down))
    width = max(PANEL[0] * across + MARGIN[0], 2 * PANEL[0])
    figure = Figure(figsize=(width, PANEL[1] * down + MARGIN[1]), layout="constrained")
    figure.suptitle(trend.title, fontsize=11)
    figure.supxlabel("block" + "".join(f"\n{line}" for line in outside), fontsize=9)
    figure.supylabel(trend.unit, fontsize=9)
    if curves:
        grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        panels = list(grid.flat)
        for axes, kind in zip(panels, curves, strict=False):
            _draw(axes, trend, curves, kind)
        for place, axes in enumerate(panels):
            axes.set_axis_on() if place < len(curves) else axes.set_axis_off()
            # Where the row below is shorter, its place is empty: this panel says the blocks.
            axes.xaxis.set_tick_params(labelbottom=place + across >= len(curves))
    return figure


Curves = dict[str, tuple[list[int], list[float]]]
"""Blocks, ascending, and their numbers, by kind of matrix."""


def curves_of(trend: Trend, layers: Sequence[LayerPicture]) -> Curves:
    """The curves of `trend_figure`; kinds in the order in which ``layers`` first has them."""
    points: dict[str, dict[int, float]] = {}
    for layer in layers:
        value = trend.value(layer)
        if layer.block is not None and value is not None:
            points.setdefault(layer.kind, {})[layer.block] = value
    return {
        kind: (sorted(found), [found[block] for block in sorted(found)])
        for kind, found in points.items()
    }


def _draw(axes: Axes, trend: Trend, curves: Curves, kind: str) -> None:
    """Draw the panel of one kind of matrix, with all others behind it."""
    from matplotlib.ticker import LogFormatter, MaxNLocator

    for other, (blocks, values) in curves.items():
        if other != kind:
            axes.plot(blocks, values, color=OTHERS, linewidth=0.8, zorder=1)
    blocks, values = curves[kind]
    marker = "o" if len(blocks) <= MARKED else ""
    axes.plot(blocks, values, color=OWN, linewidth=1.4, marker=marker, markersize=3, zorder=2)
    axes.set_title(kind, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(visible=True, axis="y", color="#eeeeee", linewidth=0.6, zorder=0)
    if trend.log and all(value > 0 for _, some in curves.values() for value in some):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        axes.tick_params(which="minor", labelsize=8)
