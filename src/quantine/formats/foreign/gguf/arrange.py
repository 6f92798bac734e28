"""What llama.cpp calls the tensors of a model, and in which order it wants their rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def row_order(stored: str, rows: int, config: Any) -> Tensor | None:
    """The model's row in each place of a stored matrix or bias; ``None`` where they are the same.

    llama.cpp rotates neighbouring channels of ``llama`` models, where transformers pairs the halves
    of a head; and it wants BLOOM's queries, keys and values one after the other.

    Args:
        stored: llama.cpp's name of the tensor.
        rows: number of its rows.
        config: of the model.
    """
    places = torch.arange(rows, device="cpu")
    if config.model_type in {"llama", "mistral"} and (".attn_q." in stored or ".attn_k." in stored):
        half = config.head_dim // 2
        halves: Tensor = places.unflatten(0, (-1, 2, half))
        return halves.transpose(1, 2).flatten()
    if config.model_type == "bloom" and ".attn_qkv." in stored:
        heads: Tensor = places.unflatten(0, (config.n_head, 3, -1))
        return heads.transpose(0, 1).flatten()
    return None


def arranged(stored: str, tensor: Tensor, config: Any) -> Tensor:
    """A float tensor ``[out, in]`` or ``[out]`` as llama.cpp wants it.

    Norms of Gemma models multiply by one plus their weight; llama.cpp stores the sum.
    """
    order = row_order(stored, len(tensor), config)
    tensor = tensor if order is None else tensor[order]
    if config.model_type in {"gemma2", "gemma3_text"} and stored.endswith("norm.weight"):
        return tensor.float() + 1
    return tensor
