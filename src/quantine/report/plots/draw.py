"""Draw every picture of a quantized directory into files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from quantine.errors import PlanError, QuantineError
from quantine.formats.inventory import inventory
from quantine.report.plots.clusters import clusters_figure, read_clusters
from quantine.report.plots.group_axes import MISSING, STEM, axis_figure
from quantine.report.plots.layer_data import LayerPicture, read_layers
from quantine.report.plots.maps import MapFigure, has_map
from quantine.report.plots.trends import TRENDS, trend_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAPS_DIRECTORY: Final = "maps"
"""Name of the directory of the pictures of single matrices."""
CLUSTERS_DIRECTORY: Final = "clusters"
"""Name of the directory of the pictures of clusters."""
DOTS_PER_INCH: Final = 100
"""Resolution of PNG files."""
PNG: Final = {"compress_level": 3}
"""Options of PNG files: half of the time to write, for a few percent more bytes."""
SVG: Final = {"Date": None}
"""Metadata of SVG files, without the time of day."""


@dataclass
class Pictures:
    """The files that were drawn, and what was left out.

    Attributes:
        files: every file, in the order of writing: a ``.png`` and an ``.svg`` of each picture.
        left_out: what was not drawn, and why, in one line each.
    """

    files: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def draw(
    directory: str | Path, target: str | Path, on_picture: Callable[[Path], None] | None = None
) -> Pictures:
    """Draw what a quantized directory holds.

    ``target/maps/LAYER`` shows where a matrix is sensitive and where its outliers are;
    ``target/outlier_share``, ``output_error`` and ``bits_per_weight`` show all layers;
    ``target/group_axis`` shows what layers chose that had a choice of axes; ``target/clusters``
    the channels of each block that were reordered. Each is written as ``.png`` and ``.svg``, and
    replaces files of these names.

    Args:
        directory: written by `quantine.quantize`.
        target: directory for the pictures, made if missing.
        on_picture: called with each picture's path, without suffix, once it is written.

    Raises:
        QuantineError: matplotlib is missing.
        PlanError: ``target`` cannot be written.
        FormatError: ``directory`` is not a finished directory of quantine, or damaged.
    """
    if find_spec("matplotlib") is None:
        raise QuantineError("pictures need matplotlib: pip install 'quantine[plot]'")
    directory, target = Path(directory), Path(target)
    found = inventory(directory)["layers"]
    _make_directory(target)
    pictures = Pictures()

    def save(figure: Figure, path: Path) -> None:
        pictures.files.extend(_save(figure, path))
        if on_picture is not None:
            on_picture(path)

    layers = _draw_maps(read_layers(directory, found), target / MAPS_DIRECTORY, save)
    unmapped = sum(not mapped for _, mapped in layers)
    if unmapped:
        pictures.left_out.append(
            f"sensitivity of {unmapped} of {len(layers)} matrices: recorded only where the method "
            "used calibration inputs"
        )
    drawn = [layer for layer, _ in layers]
    wholes = [(trend.stem, trend.missing, trend_figure(trend, drawn)) for trend in TRENDS]
    for stem, missing, figure in (*wholes, (STEM, MISSING, axis_figure(drawn))):
        if figure is None:
            pictures.left_out.append(f"{stem}: {missing}")
        else:
            save(figure, target / stem)
    for path, kinds in read_clusters(directory).items():
        _make_directory(target / CLUSTERS_DIRECTORY)
        figure = clusters_figure(f"{path}: channels in clusters of alike ranges", kinds)
        save(figure, target / CLUSTERS_DIRECTORY / path.replace("/", "_"))
    return pictures


def _draw_maps(
    layers: Iterable[LayerPicture], target: Path, save: Callable[[Figure, Path], None]
) -> list[tuple[LayerPicture, bool]]:
    """Draw every map.

    Returns:
        ``layers`` without their maps, and whether each had a sensitivity.
    """
    figures: dict[object, MapFigure] = {}
    drawn = []
    for layer in layers:
        if has_map(layer):
            _make_directory(target)
            kind = MapFigure.kind(layer)
            if kind in figures:
                figures[kind].show(layer)
            else:
                figures[kind] = MapFigure(layer)
            # Names come from a file: none may lead out of the directory.
            save(figures[kind].figure, target / layer.name.replace("/", "_"))
        mapped = layer.sensitivity is not None
        drawn.append((replace(layer, sensitivity=None, outliers=None), mapped))
    return drawn


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _save(figure: Figure, path: Path) -> list[Path]:
    """Write ``figure`` as PNG and SVG; ``path`` has no suffix, but may have dots."""
    png, svg = (path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "svg"))
    try:
        figure.savefig(png, dpi=DOTS_PER_INCH, pil_kwargs=PNG)
        figure.savefig(svg, metadata=SVG)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    return [png, svg]


def _unwritable(path: Path, error: OSError) -> PlanError:
    return PlanError(f"{path} cannot be written: {error}; choose another directory")
