"""Experts of a small model, and what they say of those of the model that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantine.errors import FamilyError
from quantine.families.derivation.one_by_one import run
from quantine.families.experts import Experts, experts_in, fused_experts, separate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Groups = tuple[tuple[str, ...], ...]
"""Groups of matrices of a block, see `quantine.families.family.Family.groups`."""


def counts_of_experts(model: PreTrainedModel) -> dict[str, int]:
    """Numbers of experts of a model, by the full path of the module that has them."""
    return {path: layout.experts for path, layout in fused_experts(model).items()}


def check_experts(model: PreTrainedModel, tokens: Tensor) -> None:
    """Give each expert of ``model`` a module, and check that it computes the same as before.

    Args:
        model: a small model with random weights.
        tokens: ``[batch, tokens]``.

    Raises:
        FamilyError: it does not.
    """
    fused = list(fused_experts(model))
    if not fused:
        return
    expected = run(model, tokens).logits
    separate(model)
    if not torch.allclose(run(model, tokens).logits, expected, rtol=1e-4, atol=1e-5):
        raise FamilyError(f"{fused[0]} computes something else than its settings or shapes say")


def with_all_experts(
    groups: Groups, block: nn.Module, prefix: str, counts: Mapping[str, int]
) -> Groups:
    """The groups of a block with those of every expert, where a small model has only some.

    Args:
        groups: of a block of a small model, in which some experts ran.
        block: that block.
        prefix: its full path.
        counts: see `counts_of_experts`.
    """
    for path, experts in experts_in(block).items():
        inside = f"{path}."
        first = next(n for n, group in enumerate(groups) if group[0].startswith(inside))
        found = tuple(
            tuple(inside + name for name in group)
            for group in experts.groups(counts[f"{prefix}.{path}"])
        )
        after = tuple(group for group in groups[first:] if not group[0].startswith(inside))
        groups = groups[:first] + found + after
    return groups


def why_router(path: str, block: nn.Module, experts: Mapping[str, Experts]) -> str | None:
    """Why a parameter beside experts stays in 16 bit; ``None`` if it is no router and no gate.

    Routers and gates stand in a module beside the experts whose matrices all have as many outputs
    as a token may choose among, or one. Those of shared experts have others, too.

    Args:
        path: of the parameter, inside its block; it has two or more dimensions.
        block: its block.
        experts: those of the block, by their paths.
    """
    outputs = len(block.get_parameter(path))
    for place, found in experts.items():
        beside = place.removesuffix(place.rpartition(".")[2])
        if not path.startswith(beside):
            continue
        module = beside + path.removeprefix(beside).partition(".")[0]
        if module == path:
            continue
        others = [len(p) for p in block.get_submodule(module).parameters() if p.ndim > 1]
        if {*others} <= {1, found.choices}:
            return "it weighs experts" if outputs == 1 else "it chooses experts"
    return None
