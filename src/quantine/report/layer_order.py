"""Layers in the order in which the model runs them, and what their names say about blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from quantine.formats.directory import REPORT, read_json

IN_BLOCK: Final = re.compile(r"^(?P<list>.*?)\.(?P<block>\d+)\.(?P<path>.+)$")
"""Name of a layer in a decoder block: path of the list of blocks, index, and path in the block."""

NamedLayer = Mapping[str, Any]
"""An entry of a list of layers, which has at least a ``name``."""


def block_and_path(name: str) -> tuple[int | None, str]:
    """Index of the decoder block of the layer ``name``, and its path inside the block.

    Returns:
        ``None`` and the whole name for a layer outside of blocks.
    """
    found = IN_BLOCK.match(name)
    return (int(found["block"]), found["path"]) if found else (None, name)


def name_in_every_block(name: str) -> str:
    """``name`` with ``*`` in place of the index of its block; as it is outside of blocks."""
    found = IN_BLOCK.match(name)
    return f"{found['list']}.*.{found['path']}" if found else name


def natural_order(layers: Iterable[NamedLayer], running: Iterable[str] = ()) -> list[Any]:
    """``layers`` by block, as numbers, and as the model runs them inside of a block.

    Layers outside of blocks come first.

    Args:
        running: names in the order in which the model runs them; layers that are not among them
            come after these in their block, in the order they have.
    """
    places = {name: place for place, name in enumerate(running)}

    def place(layer: NamedLayer) -> tuple[int, int]:
        block, _ = block_and_path(layer["name"])
        return -1 if block is None else block, places.get(layer["name"], len(places))

    return sorted(layers, key=place)


def recorded_order(directory: Path) -> list[str]:
    """Names of the layers as quantizing ran them; empty where ``directory`` lacks its report.

    A configuration lists layers by name, so the report alone knows the order inside of a block.
    """
    path = directory / REPORT
    return [layer["name"] for layer in read_json(path)["layers"]] if path.is_file() else []
