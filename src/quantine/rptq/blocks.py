"""RPTQ on one decoder block: reordering it, rounding its activations, storing and restoring it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Final

from torch import Tensor, nn

from quantine.activations.grids import HEAD_REACH
from quantine.activations.install import (
    ATTENDED,
    add_centre,
    add_grids,
    add_sites,
    key_point,
    link_of,
    read_links,
    rebuild_block,
    rotate_inputs,
    rounding_points,
    value_link,
)
from quantine.activations.reorder import reorder
from quantine.activations.rotated_inputs import SMOOTHING
from quantine.activations.rotated_values import rotate_values
from quantine.calibrate.sequential import Sequential
from quantine.calibrate.skeleton import set_tensor
from quantine.calibrate.token_means import means_by_token
from quantine.core.activation_spec import INPUT_SITES, ActivationSpec
from quantine.errors import FamilyError, FormatError
from quantine.families.family import Family
from quantine.families.heads import Heads
from quantine.families.layers import block_list
from quantine.formats.floats import as_stored
from quantine.rptq.choose_grids import (
    choose_grids,
    matrix_of,
    ranking_batches,
    ranking_samples,
)
from quantine.rptq.clusters import Clusters
from quantine.rptq.key_centres import centre_of_keys
from quantine.rptq.reordering import Reordering
from quantine.rptq.smoothing import least_noise
from quantine.source.checkpoint import Checkpoint
from quantine.source.read_record import tensor_digest
from quantine.statistics.losses import token_loss

ROUNDED_AGAIN: Final = 1e-2
"""Relative squared change of outputs below which a block computes the same: weights of 16 bits are
rounded once more when they are rotated."""


def reorder_block(
    sequential: Sequential,
    index: int,
    block: nn.Module,
    family: Family,
    heads: Heads,
    spec: ActivationSpec,
) -> Reordering:
    """Reorder the channels of a block and install the grids that round its activations.

    Args:
        sequential: the calibration text, as it enters the block.
        index: number of the block.
        block: the block with its float weights, changed in place.
        family: the model's architecture, as the block has it.
        heads: the model's numbers of heads.
        spec: bits, clusters and ranges of activations.

    Returns:
        The block's clusters and calibration ranges.
    """
    rotates = spec.rotates("value") and _rotation_pays(
        sequential, index, block, family, heads, spec
    )
    return _reordered(sequential, index, block, family, heads, spec, rotates)


def _reordered(
    sequential: Sequential,
    index: int,
    block: nn.Module,
    family: Family,
    heads: Heads,
    spec: ActivationSpec,
    rotates: bool,
) -> Reordering:
    """See `reorder_block`; ``rotates`` says whether values are rotated."""
    add_sites(block, family, spec)
    if rotates:
        _rotate_values(sequential, index, block, family, heads)
    keys = key_point(family, spec)
    if keys is not None:
        means = means_by_token(sequential, index, block.get_submodule(keys.path))
        add_centre(block, family, centre_of_keys(means, heads.keys, sequential.setup.model))
    smoothings = _smoothings(sequential, index, block, family, spec)
    rotate_inputs(block, family, lambda point: smoothings.get(point.path))
    found = sequential.ranges(index, [point.path for point in rounding_points(family)])
    held_out = ranking_samples(sequential) if spec.searches else 0
    reordering = Reordering(family, heads, spec, found, held_out, smoothings, rotates)
    ranks = sequential.setup.ranks
    ranks.agree(
        lambda: {
            f"clusters of {kind}": tensor_digest(one.cpu())
            for kind, one in reordering.maps().items()
        }
    )
    reordering.apply(block)
    ranking = ranking_batches(sequential) if spec.searches else 0
    before = sequential.outputs(index, ranking) if ranks.first else []
    add_grids(block, family, spec, reordering.grid)
    if spec.searches:
        choose_grids(sequential, index, block, reordering, before)
    return reordering


def _rotation_pays(
    sequential: Sequential,
    index: int,
    block: nn.Module,
    family: Family,
    heads: Heads,
    spec: ActivationSpec,
) -> bool:
    """Whether the block puts out less of a change with rotated values, if only values are rounded.

    Where a channel is loud all the time, a grid of its own is better than a rotation.
    """
    if value_link(family) is None:
        return False
    setup, ranking = sequential.setup, ranking_batches(sequential)
    alone = ActivationSpec(
        value=spec.value,
        clusters=spec.clusters,
        value_clusters=spec.value_clusters,
        rotated=("value",),
    )
    before = sequential.outputs(index, ranking) if setup.ranks.first else []
    blocks, losses = block_list(setup.model, setup.family), []
    for rotates in (False, True):
        blocks[index] = copy.deepcopy(block)
        try:
            _reordered(sequential, index, blocks[index], family, heads, alone, rotates)
            after = sequential.outputs(index, len(before))
        finally:
            blocks[index] = block
        losses.append(token_loss(before, after).value if before else 0.0)
    return setup.ranks.of_first(lambda: losses[1] < losses[0])


def _rotate_values(
    sequential: Sequential, index: int, block: nn.Module, family: Family, heads: Heads
) -> None:
    """Rotate the values of a block, after which it has to compute the same.

    A reorder that changes nothing says that heads are read as they are, but not that nothing bends
    single channels.

    Raises:
        FamilyError: it does not.
    """
    link = link_of(family, ATTENDED["value"])
    before = sequential.outputs(index, 1)
    rotate_values(block, link, heads)
    change = token_loss(before, sequential.outputs(index, 1)).value
    if not change < ROUNDED_AGAIN:
        raise FamilyError(
            f"{family.blocks}.{index} computes something else where values are rotated within "
            f"heads (relative squared change {change:.2g}): leave value out of rotated"
        )


def _smoothings(
    sequential: Sequential, index: int, block: nn.Module, family: Family, spec: ActivationSpec
) -> dict[str, Tensor]:
    """What inputs are divided by before they are rotated, by `RoundingPoint.path`."""
    points = [
        point
        for point in rounding_points(family)
        if point.site in INPUT_SITES and spec.rotates(point.site)
    ]
    if not points:
        return {}
    seen = sequential.ranges(index, [point.path for point in points])
    readers: dict[str, list[Tensor]] = {}
    for point in points:
        readers.setdefault(point.kind, []).append(matrix_of(block.get_submodule(point.path)))
    return {point.path: least_noise(seen[point.path].rows, readers[point.kind]) for point in points}


def restore_block(
    model: nn.Module,
    block: nn.Module,
    path: str,
    family: Family,
    spec: ActivationSpec,
    tensors: Mapping[str, Tensor],
) -> None:
    """Give a block the modules and float tensors that an interrupted run had stored for it.

    Args:
        model: the model, to which ``block`` belongs.
        block: a block with the model's own modules, changed in place.
        path: path of ``block`` in ``model``.
        family: the model's architecture, as the block has it.
        spec: bits, clusters and ranges of activations.
        tensors: what `float_tensors` had returned, by full name.

    Raises:
        FormatError: a tensor is missing; the message names it.
    """
    rebuild_block(block, path, family, spec, tensors.get)
    for name, present in block.state_dict(prefix=f"{path}.").items():
        if name in tensors:
            set_tensor(model, name, tensors[name].to(present.dtype))


def reorder_as_before(
    block: nn.Module,
    path: str,
    family: Family,
    heads: Heads,
    maps: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    """Reorder or rotate the channels of a float block as `reorder_block` did.

    It computes the same.

    Args:
        block: a block with the model's own modules and its float weights, changed in place.
        path: path of ``block`` in its model.
        family: the model's architecture, as the block has it.
        heads: the model's numbers of heads.
        maps: what `Reordering.maps` gave, by full name.
        tensors: what `float_tensors` gave, by full name.

    Raises:
        FormatError: a map is missing; the message names it.
    """
    values = value_link(family)
    if values is not None and _rotated_before(path, family, tensors):
        rotate_values(block, values, heads)
    for link in read_links(family):
        name = f"{path}.{link.kind}"
        if name not in maps:
            raise FormatError(f"there is no map of the clusters {name}: quantize again")
        labels = maps[name][:, -1].to(next(block.parameters()).device).long()
        reorder(block, link, Clusters(labels).order, heads.keys if link.per_head else 1)
    rotate_inputs(block, family, lambda point: tensors.get(f"{path}.{point.grid}.{SMOOTHING}"))


def _rotated_before(path: str, family: Family, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the values of a block were rotated: only then tokens of heads have factors."""
    points = [point for point in rounding_points(family) if point.site == "value"]
    return any(f"{path}.{point.grid}.{HEAD_REACH}" in tensors for point in points)


def float_tensors(
    block: nn.Module, path: str, checkpoint: Checkpoint, packed: Collection[str]
) -> dict[str, Tensor]:
    """The tensors that the output directory holds of a block, besides packed matrices, on the CPU.

    Args:
        block: a block that `reorder_block` has rewritten.
        path: path of ``block`` in the model.
        checkpoint: the source model, whose dtypes the tensors get.
        packed: full names of the modules whose weights are packed.

    Returns:
        Tensors by full name, those of grids and reordered norms included.
    """
    found = {}
    for name, tensor in block.state_dict(prefix=f"{path}.").items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in packed:
            continue
        source = name if name in checkpoint else f"{owner.removesuffix('.norm')}.{leaf}"
        dtype = checkpoint.dtype(source) if source in checkpoint else tensor.dtype
        found[name] = as_stored(name, tensor.to(dtype).contiguous().cpu())
    return found
