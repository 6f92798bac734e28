"""Rows for layers, which layers that differ only by block share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from quantine.report.layer_order import name_in_every_block

T = TypeVar("T")


@dataclass(frozen=True)
class LayerRow(Generic[T]):
    """One row of a table of layers, and the layers that it stands for.

    Attributes:
        name: of the layer; with ``*`` in place of the block's index where it stands for several.
        layers: at least one, in their order.
    """

    name: str
    layers: list[T]

    def shape(self, sizes: Iterable[int]) -> str:
        """The cell of a shape ``sizes``, which says for how many layers the row stands."""
        count = f"  x{len(self.layers)}" if len(self.layers) > 1 else ""
        return " x ".join(map(str, sizes)) + count


def layer_rows(
    layers: Iterable[T],
    name_of: Callable[[T], str],
    alike: Callable[[T], Hashable],
    every_layer: bool = False,
) -> list[LayerRow[T]]:
    """A row for each kind of layer, in the order in which ``layers`` first have its name.

    Layers are of a kind if their names differ only by the block's index and ``alike`` gives the
    same for them. Kinds that differ only by what ``alike`` gives are next to each other.

    Args:
        name_of: gives the full name of a layer.
        alike: gives what layers of one row have in common.
        every_layer: make a row for each layer instead.
    """
    if every_layer:
        return [LayerRow(name_of(layer), [layer]) for layer in layers]
    kinds: dict[str, dict[Hashable, list[T]]] = {}
    for layer in layers:
        same_name = kinds.setdefault(name_in_every_block(name_of(layer)), {})
        same_name.setdefault(alike(layer), []).append(layer)
    return [
        LayerRow(name if len(same) > 1 else name_of(same[0]), same)
        for name, variants in kinds.items()
        for same in variants.values()
    ]
