"""The table of what a quantized directory holds."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Final

from quantine.report.byte_text import megabytes
from quantine.report.tables.console import make_console, new_table
from quantine.report.tables.layer_rows import LayerRow, layer_rows
from quantine.report.tables.scheme_text import group_text, scheme_text

COLUMNS: Final = ("layer", "shape", "scheme", "bits/weight", "size", "output error")
CHOICE_COLUMNS: Final = ("losses of the choices", "margin")
"""Further columns where layers chose their schemes."""
GROUPED_NOTE: Final = (
    "a row with * stands for layers that differ only by block: sizes are summed, and `a to b` is "
    "the least and the greatest of their numbers; --layers lists each"
)

Layer = Mapping[str, Any]
"""An entry of ``layers`` of `quantine.formats.inventory.inventory`."""


def print_inventory(found: Mapping[str, Any], every_layer: bool = False) -> None:
    """Print what `quantine.formats.inventory.inventory` found, layers in the order they have.

    Args:
        every_layer: print a row for each layer, not one for all that differ only by block.
    """
    console = make_console()
    chosen = any(layer["choice"] for layer in found["layers"])
    table = new_table(*COLUMNS, *(CHOICE_COLUMNS if chosen else ()))
    rows = inventory_rows(found["layers"], every_layer)
    for row in rows:
        table.add_row(*_cells(row), *(_choice_cells(row.layers) if chosen else ()))
    console.print(table)
    if any(len(row.layers) > 1 for row in rows):
        console.print(GROUPED_NOTE)
    for line in _total_lines(found):
        console.print(line)


def inventory_rows(layers: Iterable[Layer], every_layer: bool = False) -> list[LayerRow[Layer]]:
    """Rows for ``layers``; those of one row have the same shape, scheme and choices."""
    return layer_rows(layers, lambda layer: str(layer["name"]), _alike, every_layer)


def _alike(layer: Layer) -> Hashable:
    """Everything that a row says once; sizes of clusters are found by layer and not shown."""
    scheme = {key: value for key, value in layer["scheme"].items() if key != "cluster_sizes"}
    choices = None if layer["choice"] is None else _choice_names(layer["choice"]["choices"])
    measured = layer["output_error"] is not None
    return json.dumps([layer["shape"], scheme, choices, measured], sort_keys=True)


def _cells(row: LayerRow[Layer]) -> list[str]:
    first = row.layers[0]
    errors = [layer["output_error"] for layer in row.layers]
    return [
        row.name,
        row.shape(first["shape"]),
        scheme_text(first["scheme"]),
        _span((layer["bits_per_weight"] for layer in row.layers), ".3f"),
        megabytes(sum(layer["bytes"] for layer in row.layers)),
        "not measured" if None in errors else _span(errors, ".3%"),
    ]


def _choice_cells(layers: list[Layer]) -> list[str]:
    """The losses of the layers' choices, and how much more the next best loses."""
    if layers[0]["choice"] is None:
        return ["", ""]
    names = _choice_names(layers[0]["choice"]["choices"])
    losses = [
        f"{name} {_span((layer['choice']['choices'][place]['loss'] for layer in layers), '.3g')}"
        for place, name in enumerate(names)
    ]
    return [", ".join(losses), _span((layer["choice"]["margin"] for layer in layers), ".1%")]


def _choice_names(choices: list[dict[str, Any]]) -> list[str]:
    """What tells the schemes of a choice apart: groups, and method and bits where these differ."""
    several = len({(one["method"], one["bits"]) for one in choices}) > 1
    return [
        (f"{one['method']} {one['bits']} bit " if several else "") + group_text(one)
        for one in choices
    ]


def _span(values: Iterable[float], form: str) -> str:
    """The least and the greatest value, as ``a to b``; one number where both read the same."""
    known = list(values)
    low, high = f"{min(known):{form}}", f"{max(known):{form}}"
    return low if low == high else f"{low} to {high}"


def _total_lines(found: Mapping[str, Any]) -> list[str]:
    totals = found["totals"]
    return [
        f"quantized: {totals['quantized_weights']:,} weights at "
        f"{totals['bits_per_weight']:.3f} bits = {totals['quantized_bytes']:,} bytes",
        f"kept: {len(found['kept'])} tensors = {totals['kept_bytes']:,} bytes",
        f"file headers: {totals['header_bytes']:,} bytes",
        f"weight files: {totals['file_bytes']:,} bytes",
        f"arithmetic: {found['arithmetic']}",
        f"kernel: {found['kernel']['name']}: {found['kernel']['why']}",
        *_expert_lines(found["layers"]),
    ]


def _expert_lines(layers: Iterable[Layer]) -> list[str]:
    """Which experts had too little calibration text; nothing where there are none."""
    inside = [layer for layer in layers if layer["tokens"] is not None]
    lacking = sorted(
        (one for one in inside if one["tokens_borrowed"]), key=lambda one: one["tokens"]
    )
    if not inside:
        return []
    if not lacking:
        return [f"experts: all {len(inside)} matrices have seen as many tokens as they have inputs"]
    least = ", ".join(f"{one['name']} ({one['tokens']})" for one in lacking[:3])
    return [
        f"experts: {len(lacking)} of {len(inside)} matrices have seen fewer tokens than they have "
        f"inputs, and borrowed the mean of others; least: {least}; use more samples"
    ]
