"""The facts that a page states, read from a quantized directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from quantine.errors import FormatError, PlanError
from quantine.eval.comparison_row import COMPARISON_STEM
from quantine.eval.memory import cache_bytes
from quantine.formats.directory import REPORT, read_json
from quantine.formats.inventory import inventory
from quantine.report.plots.clusters import Blocks, read_clusters
from quantine.report.plots.layer_data import LayerPicture, read_layers
from quantine.report.record import recorded
from quantine.report.verdict import Check, checks_of
from quantine.source.locate import locate

THUMBNAILS: Final = 6
"""Number of matrices whose outliers a page shows: those with the largest shares."""
COMPARISON: Final = f"{COMPARISON_STEM}.json"
"""Name of the file of a comparison that a page reads."""


@dataclass(frozen=True)
class Facts:
    """What the sections of a page draw on.

    Attributes:
        name: of the directory.
        report: the content of its ``quantine_report.json``.
        inventory: of `quantine.formats.inventory.inventory`.
        scores: of `quantine.report.record.recorded`; ``None`` if nothing was measured.
        checks: numbers with floors; empty without floors.
        layers: every matrix, without maps.
        thumbnails: those with most outliers, with their maps.
        comparison: content of a ``comparison.json``; ``None`` without one.
        cache: bytes of the key-value cache in 16 bit by number of tokens.
        clusters: see `quantine.report.plots.clusters.read_clusters`.
    """

    name: str
    report: dict[str, Any]
    inventory: dict[str, Any]
    scores: dict[str, Any] | None
    checks: list[Check]
    layers: list[LayerPicture]
    thumbnails: list[LayerPicture]
    comparison: dict[str, Any] | None
    cache: dict[int, int]
    clusters: Blocks


def gather(directory: Path, floors: Mapping[str, float], comparison: Path | None) -> Facts:
    """Read the facts about the quantized ``directory``.

    Args:
        floors: see `quantine.report.verdict.floors_of`.
        comparison: directory of `quantine.comparison.run.compare`.

    Raises:
        FormatError: ``directory`` is not a finished directory of quantine, or damaged; a file is no
            comparison.
        PlanError: there is no comparison, or no number that a floor speaks of.
    """
    found = inventory(directory)
    scores = recorded(directory)
    checks = checks_of(scores or {"texts": {}, "tasks": {}}, floors)
    layers, thumbnails = _layers(directory, found)
    config = locate(directory).config()
    longest = getattr(config, "max_position_embeddings", None) or 2048
    return Facts(
        directory.absolute().name,
        read_json(directory / REPORT),
        found,
        scores,
        checks,
        layers,
        thumbnails,
        None if comparison is None else _comparison(comparison),
        {tokens: cache_bytes(config, tokens) for tokens in sorted({min(2048, longest), longest})},
        read_clusters(directory),
    )


def _layers(
    directory: Path, found: dict[str, Any]
) -> tuple[list[LayerPicture], list[LayerPicture]]:
    """All matrices without maps, and those with most outliers with theirs.

    No more maps than these are in memory at once.
    """
    layers: list[LayerPicture] = []
    top: list[LayerPicture] = []
    for layer in read_layers(directory, found["layers"]):
        layers.append(replace(layer, sensitivity=None, outliers=None))
        if layer.outliers is not None:
            top.append(replace(layer, sensitivity=None))
            top.sort(key=lambda one: one.outlier_share or 0.0, reverse=True)
            del top[THUMBNAILS:]
    return layers, top


def _comparison(directory: Path) -> dict[str, Any]:
    """The content of the file of a comparison, once it is known to be one."""
    path = directory / COMPARISON
    if not path.is_file():
        raise PlanError(f"{directory} holds no {COMPARISON}: make it with `quantine compare`")
    found = read_json(path)
    if not isinstance(found, dict) or not {"rows", "pareto"} <= found.keys():
        raise FormatError(f"{path} is no comparison: make it with `quantine compare`")
    return found
