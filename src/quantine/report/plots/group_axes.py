"""The picture of group axes: each matrix's, by depth and kind, and what either would lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from quantine.report.plots.layer_data import LayerPicture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEM: Final = "group_axis"
"""Name of the files of the picture, without suffix."""
MISSING: Final = "all groups run along the same axis, and no layer chose it"
"""Reason why there may be no picture."""
COLOURS: Final = {"in": "#1b3a6b", "out": "#c8553d"}
"""Colour by the axis that groups run along; the colours differ in grey, too."""
NAMES: Final = {"in": "along inputs", "out": "along outputs"}
"""Label by the axis that groups run along."""
ACROSS: Final = 4
"""Largest number of panels in a row, where there is room."""
PANEL: Final = (2.5, 2.2)
"""Size of a panel in inches."""
STRIP: Final = 0.3
"""Height of a kind's row of tiles, in inches."""
MARGIN: Final = (0.75, 1.3)
"""Inches for labels at the left, and for title and labels above and below."""


def axis_figure(layers: Sequence[LayerPicture], most: int = ACROSS) -> Figure | None:
    """Tiles of the layers' axes, above curves of both losses where layers compared these.

    Args:
        most: panels in a row.

    Returns:
        ``None`` if no layer compared them, and all have the same axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    kinds: dict[str, dict[int, LayerPicture]] = {}
    for layer in layers:
        if layer.block is not None:
            kinds.setdefault(layer.kind, {})[layer.block] = layer
    compared = {
        kind: chose
        for kind, found in kinds.items()
        if (chose := {block: one for block, one in found.items() if one.axis_losses is not None})
    }
    axes = {layer.group_axis for found in kinds.values() for layer in found.values()}
    if not compared and len(axes) < 2:
        return None
    down = -(-len(compared) // most)
    across = -(-len(compared) // max(1, down))
    tiles = STRIP * len(kinds) + 0.4
    size = (PANEL[0] * across + MARGIN[0], tiles + PANEL[1] * down + MARGIN[1])
    figure = Figure(figsize=(max(size[0], min(3, most) * PANEL[0]), size[1]), layout="constrained")
    title = "The axis that groups run along" + (", and what either would lose" if compared else "")
    figure.suptitle(title, fontsize=11)
    ratios = [tiles, *[PANEL[1]] * down]
    grid = figure.add_gridspec(down + 1, max(1, across), height_ratios=ratios)
    _draw_tiles(figure.add_subplot(grid[0, :]), kinds)
    for place, (kind, found) in enumerate(compared.items()):
        row, column = divmod(place, across)
        _draw_losses(figure.add_subplot(grid[row + 1, column]), kind, found)
    figure.supxlabel("block", fontsize=9)
    if compared:
        figure.supylabel("loss", fontsize=9)
    patches = [Patch(color=COLOURS[axis], label=NAMES[axis]) for axis in COLOURS]
    figure.legend(handles=patches, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def _draw_tiles(axes: Axes, kinds: dict[str, dict[int, LayerPicture]]) -> None:
    """A row of tiles for each kind of matrix, a tile for each block, coloured by the axis."""
    for row, found in enumerate(kinds.values()):
        for block, layer in found.items():
            axes.barh(row, 0.92, left=block - 0.46, height=0.8, color=COLOURS[layer.group_axis])
    axes.set_yticks(range(len(kinds)), list(kinds), fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8, length=0)
    axes.set_frame_on(False)


def _draw_losses(axes: Axes, kind: str, found: dict[int, LayerPicture]) -> None:
    """Two curves over blocks: what matrices of one kind lose with either axis."""
    from matplotlib.ticker import MaxNLocator

    blocks = sorted(found)
    for axis, colour in COLOURS.items():
        losses = [(found[block].axis_losses or {}).get(axis, float("nan")) for block in blocks]
        axes.plot(blocks, losses, color=colour, linewidth=1.2, marker="o", markersize=2.5)
        if all(loss > 0 for loss in losses):
            axes.set_yscale("log")
    axes.set_title(kind, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(visible=True, axis="y", color="#eeeeee", linewidth=0.6, zorder=0)
