"""The part of a model that runs its blocks, without its head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from quantine.families.family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_of(model: PreTrainedModel, family: Family) -> tuple[str, nn.Module]:
    """Path in ``model`` of the model without its head, and that module.

    Some classes give the path that it has in a larger model, and are their own base then. Theirs is
    the first model on the way to the blocks.

    Args:
        model: a causal language model.
        family: its architecture.
    """
    from transformers import PreTrainedModel

    if model.base_model is not model:
        return model.base_model_prefix, model.base_model
    steps = family.blocks.split(".")
    for end in range(1, len(steps)):
        path = ".".join(steps[:end])
        if isinstance(found := model.get_submodule(path), PreTrainedModel):
            return path, found
    return "", model
