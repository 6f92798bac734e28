"""Where in a decoder block activations are rounded, and how the modules that round get there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from quantine.activations.centred_keys import CENTRE_NAME, CentredKeys
from quantine.activations.grids import StaticGrid, TokenGrid
from quantine.activations.modules import SITES_NAME, AttentionSites, GriddedConv1D, GriddedLinear
from quantine.activations.reorder import permute_norm
from quantine.activations.rotated_inputs import (
    CENTRE,
    SMOOTHING,
    RotatedGrid,
    RotatedInputs,
    rotate_weight,
)
from quantine.activations.stored import check_tensor
from quantine.core.activation_spec import CONSUMED, SITES, UNQUANTIZED, ActivationSpec
from quantine.errors import FormatError
from quantine.families.family import Family, Link
from quantine.families.layers import INPUTS_NAME, is_transposed

ATTENDED: Final = {"query": "R2", "key": "R2", "value": "R3"}
"""The sites inside of attention, and for each the reorder whose clusters its channels have."""


@dataclass(frozen=True)
class RoundingPoint:
    """A point in a decoder block where activations are rounded: the input of one module.

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
    """Every point where activations can be rounded in a block of ``family``.

    What is said of ``family`` here and below is what `Family.in_block` says of the block.
    """
    found = [
        RoundingPoint(CONSUMED[link.kind], link.kind, path)
        for link in family.links
        for path in link.consumers
    ]
    if not family.attention:
        return found
    inside, kinds = f"{family.attention}.{SITES_NAME}", {link.kind for link in family.links}
    return found + [
        RoundingPoint(site, kind, f"{inside}.{site}")
        for site, kind in ATTENDED.items()
        if kind in kinds
    ]


def rounded_sites(family: Family, spec: ActivationSpec) -> list[str]:
    """The fields of ``spec`` that say how something is rounded in at least one block."""
    blocks = [family.in_block(index) for index in range(max(1, len(family.block_links)))]
    found = {point.site for one in blocks for point in rounding_points(one)}
    found |= {"softmax"} if any(one.attention for one in blocks) else set()
    return [site for site in SITES if site in found and getattr(spec, site) != UNQUANTIZED]


def read_links(family: Family) -> list[Link]:
    """The links of a block of ``family`` along whose channels something can be rounded."""
    kinds = {point.kind for point in rounding_points(family)}
    return [link for link in family.links if link.kind in kinds]


def link_of(family: Family, kind: str) -> Link:
    """The reorder ``kind``, ``"R1"`` to ``"R5"``, of ``family``."""
    return next(link for link in family.links if link.kind == kind)


def value_link(family: Family) -> Link | None:
    """The reorder R3, along which values are rotated, of a block; ``None`` where they stay."""
    if all(point.site != "value" for point in rounding_points(family)):
        return None
    return link_of(family, ATTENDED["value"])


def add_sites(block: nn.Module, family: Family, spec: ActivationSpec) -> None:
    """Give the attention module of ``block``, if one can round, its `AttentionSites`.

    Probabilities are rounded from here on, as ``spec`` says; queries, keys and values only after
    `add_grids`.
    """
    if not family.attention:
        return
    sites = AttentionSites()
    sites.softmax, sites.relative = spec.softmax, spec.relative
    setattr(block.get_submodule(family.attention), SITES_NAME, sites)


def key_point(family: Family, spec: ActivationSpec) -> RoundingPoint | None:
    """Where keys of a block are rounded less their centre; ``None`` if ``spec`` or they do not."""
    points = [point for point in rounding_points(family) if point.site == "key"]
    return points[0] if points and spec.centred_keys else None


def add_centre(block: nn.Module, family: Family, centre: CentredKeys) -> None:
    """Let the attention of ``block``, which has been through `add_sites`, centre its keys."""
    setattr(block.get_submodule(family.attention).get_submodule(SITES_NAME), CENTRE_NAME, centre)


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
    made: Callable[[RoundingPoint, int], StaticGrid],
) -> None:
    """Install the modules that round the activations of ``block``.

    The block has been through `add_sites`. Sites of 16 bits are left as they are.

    Args:
        made: builds the static grid of a point, given its bits; not called for per-token grids.
    """
    for point in rounding_points(family):
        bits = getattr(spec, point.site)
        if bits == UNQUANTIZED:
            continue
        token = spec.granularity == "token"
        _put(block, point, TokenGrid(bits) if token else made(point, bits))


def rotate_inputs(
    block: nn.Module, family: Family, smoothing_at: Callable[[RoundingPoint], Tensor | None]
) -> None:
    """Let matrices of a float block rotate their inputs; it computes the same.

    Args:
        block: changed in place.
        family: the model's architecture.
        smoothing_at: gives what the inputs of a point are divided by before, see `RotatedInputs`;
            ``None`` where they are not rotated.
    """
    for point in rounding_points(family):
        smoothing = smoothing_at(point)
        if smoothing is not None:
            rotate_weight(block.get_submodule(point.path), smoothing)
            _put(block, point, RotatedInputs(smoothing))


def rebuild_block(
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
        block: a block with the model's own modules, changed in place.
        path: path of the block in the model.
        family: the model's architecture.
        spec: bits, clusters and ranges of activations.
        tensor_of: gives the stored tensor of a full name, which may be on the meta device; ``None``
            where there is none.

    Raises:
        FormatError: a tensor is missing, or an order is not int32; the message names it.
    """

    def needed(name: str) -> Tensor:
        found = tensor_of(f"{path}.{name}")
        if found is None:
            raise FormatError(
                f"config.json says that activations are rounded, but no file holds {path}.{name}"
            )
        return found

    def order(norm: str) -> Tensor:
        found = needed(f"{norm}.order")
        check_tensor(f"{path}.{norm}.order", found, torch.int32, tuple(found.shape))
        return found

    def grid(point: RoundingPoint, bits: int) -> StaticGrid:
        scale, zero, labels = (needed(f"{point.grid}.{name}") for name in StaticGrid.tensor_names)
        more = (tensor_of(f"{path}.{point.grid}.{name}") for name in StaticGrid.optional_names)
        found = StaticGrid(bits, scale, zero, labels, *more)
        if point.site in ATTENDED or not spec.rotates(point.site):
            return found
        return RotatedGrid(found, *(needed(f"{point.grid}.{name}") for name in (SMOOTHING, CENTRE)))

    add_sites(block, family, spec)
    if key_point(family, spec) is not None:
        inside = f"{family.attention}.{SITES_NAME}.{CENTRE_NAME}"
        tensors = (needed(f"{inside}.{name}") for name in CentredKeys.tensor_names)
        add_centre(block, family, CentredKeys(*tensors))
    add_norms(block, family, spec, order)
    add_grids(block, family, spec, grid)


def _put(block: nn.Module, point: RoundingPoint, grid: nn.Module) -> None:
    path, _, leaf = point.path.rpartition(".")
    parent, module = block.get_submodule(path), block.get_submodule(point.path)
    if point.site in ATTENDED:
        setattr(parent, leaf, grid)
    elif isinstance(module, GriddedLinear | GriddedConv1D):
        module.inputs = grid
    elif isinstance(module, nn.Linear):
        setattr(parent, leaf, GriddedLinear(module, grid))
    elif is_transposed(module):
        setattr(parent, leaf, GriddedConv1D(module, grid))
    else:
        setattr(module, INPUTS_NAME, grid)
