"""Where in a block activations are rounded, and how the modules for that get there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from quantine.activations.grids import FEEDBACK, REACH, StaticGrid, TokenGrid
from quantine.activations.modules import SITES_NAME, AttentionSites, GriddedLinear
from quantine.activations.reorder import permute_norm
from quantine.core.activation_spec import UNQUANTIZED, ActivationSpec
from quantine.errors import FormatError
from quantine.families.family import Family, Link
from quantine.families.layers import INPUTS_NAME

CONSUMED: Final = {"R1": "norm", "R3": "attention", "R4": "norm", "R5": "hidden"}
"""What the consumers of a reorder read, as a site of `ActivationSpec`."""
ATTENDED: Final = {"query": "R2", "key": "R2", "value": "R3"}
"""The sites inside of attention, and the reorders whose clusters they have."""


@dataclass(frozen=True)
class RoundingPoint:
    """A module of a block whose input is rounded.

    Attributes:
        site: as a field of `ActivationSpec`.
        kind: the reorder whose clusters it has.
        path: inside the block, of a matrix, or of a child of `AttentionSites`.
    """

    site: str
    kind: str
    path: str

    @property
    def grid(self) -> str:
        """Path, inside the block, of the module that rounds."""
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
    """The reorder ``kind`` of ``family``."""
    return next(link for link in family.links if link.kind == kind)


def add_sites(block: nn.Module, family: Family, spec: ActivationSpec) -> None:
    """Let the attention of ``block`` round; probabilities are rounded from here on."""
    sites = AttentionSites()
    sites.softmax, sites.relative = spec.softmax, spec.relative
    setattr(block.get_submodule(family.attention), SITES_NAME, sites)


def add_norms(
    block: nn.Module, family: Family, spec: ActivationSpec, order_of: Callable[[str], Tensor]
) -> None:
    """Let the norms of ``block`` write reordered channels.

    Args:
        order_of: ``[channels]`` integers by the path of a norm.
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
    """Let ``block``, which has its `AttentionSites`, round activations.

    Args:
        made: the static grid of a place, given bits.
    """
    for place in rounding_points(family):
        bits = getattr(spec, place.site)
        if bits == UNQUANTIZED:
            continue
        token = spec.granularity == "token"
        _put(block, place, TokenGrid(bits) if token else made(place, bits))


def rebuild(
    block: nn.Module,
    path: str,
    family: Family,
    spec: ActivationSpec,
    tensor_of: Callable[[str], Tensor | None],
) -> None:
    """Give ``block`` the modules that a run gave it, with the tensors that the run stored.

    These are its `AttentionSites`, the norms that write reordered channels, and the static grids.
    Weights and biases, those of norms included, stay as ``block`` has them.

    Args:
        path: of the block in the model.
        tensor_of: the stored tensor by its full name, which may be on the meta device; ``None``
            where there is none.

    Raises:
        FormatError: names a tensor that is missing.
    """

    def needed(name: str) -> Tensor:
        found = tensor_of(f"{path}.{name}")
        if found is None:
            raise FormatError(
                f"config.json says that activations are rounded, but no file holds {path}.{name}"
            )
        return found

    def grid(place: RoundingPoint, bits: int) -> StaticGrid:
        scale, zero, labels = (needed(f"{place.grid}.{name}") for name in StaticGrid.tensor_names)
        more = (tensor_of(f"{path}.{place.grid}.{name}") for name in (FEEDBACK, REACH))
        return StaticGrid(bits, scale, zero, labels, *more)

    add_sites(block, family, spec)
    add_norms(block, family, spec, lambda norm: needed(f"{norm}.order"))
    add_grids(block, family, spec, grid)


def _put(block: nn.Module, place: RoundingPoint, grid: nn.Module) -> None:
    path, _, leaf = place.path.rpartition(".")
    parent, module = block.get_submodule(path), block.get_submodule(place.path)
    if place.site in ATTENDED:
        setattr(parent, leaf, grid)
    elif type(module) is nn.Linear:
        setattr(parent, leaf, GriddedLinear(module, grid))
    else:
        setattr(module, INPUTS_NAME, grid)
