"""A block whose channels are reordered and whose activations are rounded."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from quantine.activations.install import add_grids, add_sites, rebuild, rounding_points
from quantine.calibrate.sequential import Sequential
from quantine.calibrate.skeleton import set_tensor
from quantine.core.activation_spec import ActivationSpec
from quantine.families.family import Family
from quantine.formats.floats import as_stored
from quantine.rptq.choose_grids import choose_grids, ranking_batches, ranking_samples
from quantine.rptq.reordering import Heads, Reordering
from quantine.source.checkpoint import Checkpoint


def reorder_block(
    sequential: Sequential,
    index: int,
    block: nn.Module,
    family: Family,
    heads: Heads,
    spec: ActivationSpec,
) -> Reordering:
    """Reorder the channels of block ``index``, and let it round its activations."""
    add_sites(block, family, spec)
    found = sequential.ranges(index, [place.path for place in rounding_points(family)])
    held_out = ranking_samples(sequential) if spec.searches else 0
    reordering = Reordering(family, heads, spec, found, held_out)
    reordering.apply(block)
    ranking = ranking_batches(sequential) if spec.searches else 0
    before = sequential.outputs(index, ranking)
    add_grids(block, family, spec, reordering.grid)
    if spec.searches:
        choose_grids(sequential, index, block, reordering, before)
    return reordering


def restore_block(
    model: nn.Module,
    block: nn.Module,
    path: str,
    family: Family,
    spec: ActivationSpec,
    tensors: Mapping[str, Tensor],
) -> None:
    """Give ``block``, found at ``path``, the structure and the floats that a run had stored.

    Args:
        tensors: of the block, by full name.

    Raises:
        FormatError: names a tensor that is missing.
    """
    rebuild(block, path, family, spec, tensors.get)
    for name, present in block.state_dict(prefix=f"{path}.").items():
        if name in tensors:
            set_tensor(model, name, tensors[name].to(present.dtype))


def float_tensors(
    block: nn.Module, path: str, checkpoint: Checkpoint, packed: Collection[str]
) -> dict[str, Tensor]:
    """What the output holds of a rewritten block besides packed matrices, on the CPU, by full name.

    Args:
        packed: names of the modules whose weights are packed.
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
