"""Where in a decoder block activations are rounded, and how the modules that round get there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from quantine.activations.grids import TokenGrid
from quantine.activations.modules import SITES_NAME, AttentionSites, GriddedLinear
from quantine.activations.reorder import permute_norm
from quantine.core.activation_spec import UNQUANTIZED, ActivationSpec
from quantine.families.family import Family, Link
from quantine.families.layers import INPUTS_NAME

CONSUMED: Final = {"R1": "norm", "R3": "attention", "R4": "norm", "R5": "hidden"}
"""For each reorder of RPTQ the site, a field of `ActivationSpec`, that its consumers read."""
ATTENDED: Final = {"query": "R2", "key": "R2", "value": "R3"}
"""The sites inside of attention, and for each the reorder whose clusters its channels have."""


@dataclass(frozen=True)
class RoundingPoint:
    """A place in a decoder block where activations are rounded: the input of one module.

    Attributes:
        site: the field of `ActivationSpec` that has its bits.
        kind: the reorder, ``"R1"`` to ``"R5"``, whose clusters its channels have.
        path: path inside the block of the module: a matrix, or a child of `AttentionSites`.
    """

    site: str
    kind: str
    path: str

    @property
    def grid(self) -> str:
        """Path inside the block of the module that rounds, one of `quantine.activations.grids`."""
        return self.path if self.site in ATTENDED else f"{self.path}.{INPUTS_NAME}"


def rounding_points(family: Family) -> list[RoundingPoint]:
    """Every place in a block of ``family`` where activations can be rounded."""
    found = [
        RoundingPoint(CONSUMED[link.kind], link.kind, path)
        for link in family.links
        for path in link.consumers
    ]
    inside = f"{family.attention}.{SITES_NAME}"
    return found + [
        RoundingPoint(site, kind, f"{inside}.{site}") for site, kind in ATTENDED.items()
    ]


def link_of(family: Family, kind: str) -> Link:
    """The reorder ``kind``, ``"R1"`` to ``"R5"``, of ``family``."""
    return next(link for link in family.links if link.kind == kind)


def add_sites(block: nn.Module, family: Family, spec: ActivationSpec) -> None:
    """Give the attention module of ``block`` its `AttentionSites`.

    Probabilities are rounded from here on, as ``spec`` says; queries, keys and values only after
    `add_grids`.
    """
    sites = AttentionSites()
    sites.softmax, sites.relative = spec.softmax, spec.relative
    setattr(block.get_submodule(family.attention), SITES_NAME, sites)


def add_norms(
    block: nn.Module, family: Family, spec: ActivationSpec, order_of: Callable[[str], Tensor]
) -> None:
    """Let the norms of ``block`` that feed matrices write their channels in another order.

    Nothing is done where ``spec`` asks for no reordering.

    Args:
        order_of: gives the order ``[channels]`` int64 for the path of a norm inside the block.
    """
    for link in family.links:
        if spec.reorders and link.fold == "gather":
            for path in link.producers:
                permute_norm(block, path, order_of(path))


def add_grids(
    block: nn.Module,
    family: Family,
    spec: ActivationSpec,
    made: Callable[[RoundingPoint, int], nn.Module],
) -> None:
    """Install the modules that round the activations of ``block``.

    The block has been through `add_sites`. Sites of 16 bits are left as they are.

    Args:
        made: builds the static grid of a place, given its bits; not called for per-token grids.
    """
    for place in rounding_points(family):
        bits = getattr(spec, place.site)
        if bits == UNQUANTIZED:
            continue
        token = spec.granularity == "token"
        _put(block, place, TokenGrid(bits) if token else made(place, bits))


def _put(block: nn.Module, place: RoundingPoint, grid: nn.Module) -> None:
    path, _, leaf = place.path.rpartition(".")
    parent, module = block.get_submodule(path), block.get_submodule(place.path)
    if place.site in ATTENDED:
        setattr(parent, leaf, grid)
    elif type(module) is nn.Linear:
        setattr(parent, leaf, GriddedLinear(module, grid))
    else:
        setattr(module, INPUTS_NAME, grid)
