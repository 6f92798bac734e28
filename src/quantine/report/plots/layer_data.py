"""What pictures show of each layer, read from a quantized directory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from quantine.errors import FormatError
from quantine.formats import format_named
from quantine.formats.directory import MAPS
from quantine.formats.finished import FinishedDirectory
from quantine.formats.stored_config import spec_of
from quantine.report.layer_order import block_and_path
from quantine.statistics.sensitivity_map import MAP_CELLS, cell_of, pool_mean

WEIGHTS_PER_CELL: Final = 32
"""Fewest weights in a cell that is drawn: their errors are so unequal that noise hides stripes."""
OUTLIERS_PER_CELL: Final = 2.0
"""Fewest outliers in a cell that is drawn, on average, for the same reason."""
SMALLEST_MAP: Final = 32
"""Cells that an axis keeps, however few outliers there are."""


@dataclass(frozen=True)
class LayerPicture:
    """What pictures show of one quantized matrix.

    Attributes:
        name: the module.
        shape: ``(out, in)``.
        block: index of its decoder block, ``None`` outside of blocks.
        kind: its path inside the block; its name outside of blocks.
        bits_per_weight: counted from the files.
        output_error: relative squared error of the output; ``None`` where it was not measured.
        outlier_share: share of weights kept as outliers; ``None`` for layouts without.
        sensitivity: ``[rows, columns]`` float32, the recorded map, see
            `quantine.statistics.sensitivity_map.sensitivity_map`; ``None`` where there is none.
        outliers: ``[rows, columns]`` int64 number of outliers in each cell, see `outlier_counts`;
            ``None`` where there are none.
        group_axis: the axis that groups run along, ``"in"`` or ``"out"``.
        axis_losses: the least loss of all choices with groups along an axis, by axis; ``None``
            where the layer had no choice between axes.
    """

    name: str
    shape: tuple[int, int]
    block: int | None
    kind: str
    bits_per_weight: float
    output_error: float | None
    outlier_share: float | None
    sensitivity: Tensor | None
    outliers: Tensor | None
    group_axis: str = "in"
    axis_losses: dict[str, float] | None = None


def read_layers(directory: Path, layers: Iterable[dict[str, Any]]) -> Iterator[LayerPicture]:
    """The matrices of ``directory``, one in memory at a time.

    Args:
        layers: of `quantine.formats.inventory.inventory`.

    Raises:
        FormatError: a file is damaged.
    """
    finished = FinishedDirectory(directory)
    maps = read_maps(directory)
    for layer in layers:
        name = layer["name"]
        block, path = block_and_path(name)
        counts, share = _outliers(finished, name)
        yield LayerPicture(
            name,
            tuple(layer["shape"]),
            block,
            path,
            layer["bits_per_weight"],
            layer["output_error"],
            share,
            maps.get(name),
            counts,
            spec_of(layer["scheme"]).group_axis,
            _axis_losses(layer["choice"]),
        )


def outlier_counts(places: tuple[Tensor, Tensor], shape: tuple[int, int]) -> Tensor:
    """Outliers in each cell of a map.

    Cells are those of the sensitivity map, or larger where most of them would hold no outlier.

    Args:
        places: output and input of each outlier, ``[entries]`` int64.
        shape: ``(out, in)``.

    Returns:
        ``[rows, columns]`` int64.
    """
    cells = MAP_CELLS
    while cells > SMALLEST_MAP and len(places[0]) < OUTLIERS_PER_CELL * cells**2:
        cells //= 2
    rows, columns = (cell_of(length, cells) for length in shape)
    height, width = int(rows[-1]) + 1, int(columns[-1]) + 1
    flat = rows[places[0]] * width + columns[places[1]]
    return flat.bincount(minlength=height * width).view(height, width)


def readable_map(layer: LayerPicture) -> Tensor:
    """The sensitivity of ``layer`` in cells that hold enough weights, ``[rows, columns]`` float32.

    Cells of the recorded map are joined by the mean of what they stand for.
    """
    assert layer.sensitivity is not None
    cells = MAP_CELLS
    while cells > SMALLEST_MAP and math.prod(layer.shape) < WEIGHTS_PER_CELL * cells**2:
        cells //= 2
    linear = torch.pow(10.0, layer.sensitivity.double())
    return pool_mean(linear, cells=cells).log10().float()


def _axis_losses(choice: dict[str, Any] | None) -> dict[str, float] | None:
    """The least loss along each axis, if there was a choice between axes."""
    losses: dict[str, float] = {}
    for one in choice["choices"] if choice else ():
        axis = one["group_axis"]
        losses[axis] = min(one["loss"], losses.get(axis, math.inf))
    return losses if len(losses) > 1 else None


def _outliers(finished: FinishedDirectory, name: str) -> tuple[Tensor | None, float | None]:
    """The map of a layer's outliers, see `outlier_counts`, and their share of its weights."""
    scheme = finished.scheme(name)
    if not format_named(scheme["format"]).supports(spec_of(scheme), outliers=True):
        return None, None  # not worth unpacking
    qtensor = finished.qtensor(name)
    outliers = qtensor.outliers
    if outliers is None or outliers.entries == 0:
        return None, 0.0
    columns = outliers.columns
    if qtensor.in_perm is not None:
        columns = qtensor.in_perm[columns]
    counts = outlier_counts((outliers.row_indices(), columns), outliers.shape)
    return counts, outliers.entries / math.prod(outliers.shape)


def read_maps(directory: Path) -> dict[str, Tensor]:
    """What quantizing recorded for pictures, by name, which a copied directory may lack.

    Raises:
        FormatError: the file is damaged.
    """
    path = directory / MAPS
    if not path.is_file():
        return {}
    try:
        return {name: stored.float() for name, stored in load_file(path).items()}
    except SafetensorError as error:
        raise FormatError(f"{path} is damaged ({error}): delete it, it holds maps only") from error
