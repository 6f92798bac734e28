"""The angles of a model's rotary embeddings."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from quantine.errors import FamilyError

STATIC_ROPE: Final = frozenset({"default", "linear", "llama3", "yarn"})
"""Types of rotary embeddings whose angles do not depend on the length of the text."""
ANGLES: Final = "inv_freq"
"""What the buffers of transformers' modules of rotary embeddings are called, or end with."""
UNSCALED: Final = "original_inv_freq"
"""What those end with that such a module keeps beside them."""


def turns_of(model: nn.Module) -> Tensor:
    """By how many radians rotary embeddings turn each pair of channels from token to token.

    Args:
        model: where it has no values yet, the result has none either, and only shapes tell whether
            there are several kinds.

    Returns:
        ``[pairs]`` float32.

    Raises:
        FamilyError: there are no rotary embeddings, several different ones, or some whose angles
            depend on the length of the text.
    """
    found: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if not name.endswith(ANGLES) or name.endswith(UNSCALED):
            continue
        kind = getattr(model.get_submodule(name.rpartition(".")[0]), "rope_type", "default")
        if not isinstance(kind, str) or kind not in STATIC_ROPE:
            raise _refused(f"has rotary embeddings of type {kind}")
        if not any(_alike(buffer, one) for one in found):
            found.append(buffer)
    if len(found) != 1:
        raise _refused(f"has {len(found) or 'no'} kinds of rotary embeddings")
    return found[0].detach().float()


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return one.is_meta or other.is_meta or torch.equal(one, other)


def _refused(why: str) -> FamilyError:
    return FamilyError(
        f"keys are centred by rotary embeddings of one kind, whose angles do not depend on the "
        f"length of the text, but this model {why}: leave out -centred (centred_keys)"
    )
