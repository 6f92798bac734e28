"""What tells the native decoder the positions of tokens: angles, learned tables, biases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

from quantine.families.rotary import STATIC_ROPE
from quantine.runtime.decoder_checks import Classes, expect, refuse

LONG_ROPE: Final = "longrope"
"""Their type where all angles change once the text is longer than what the model was first trained
with; up to there they are static."""
LEARNED: Final = "LearnedPositionalEmbedding"
"""What the names of tables of positions end with whose first rows are for no position."""

Biases = Callable[[Any, Classes, int], Tensor]
"""What a model adds to scores: ``(body, classes, capacity)`` to ``[heads, capacity]``, by head and
position of the key."""


@dataclass(frozen=True)
class Angles:
    """Native tables of the cosines and sines of rotary embeddings, one for each type of layer.

    Attributes:
        rotary: the model's module of rotary embeddings.
        native: the module ``quantine._native``.
        capacity: number of positions in a table.
        neighbours: whether a number is rotated with the one beside it, instead of the one half of
            what is rotated away.
        partial: whether the model leaves the end of a head as it is where there are fewer angles.
        tables: the tables made so far, by type of layer.
    """

    rotary: Any
    native: ModuleType
    capacity: int
    neighbours: bool
    partial: bool
    tables: dict[str, Any] = field(default_factory=dict)

    def of(self, layer_type: str, head_dim: int) -> Any:
        """The table of layers of one type.

        Raises:
            BackendUnavailable: angles depend on the length of the text, or there are fewer than the
                model needs.
        """
        if layer_type not in self.tables:
            self.tables[layer_type] = self._table(layer_type, head_dim)
        return self.tables[layer_type]

    def _table(self, layer_type: str, head_dim: int) -> Any:
        several = isinstance(self.rotary.rope_type, dict)
        kind = self.rotary.rope_type[layer_type] if several else self.rotary.rope_type
        if kind == LONG_ROPE:
            rules = self.rotary.config.rope_parameters
            most = (rules[layer_type] if several else rules)["original_max_position_embeddings"]
            if self.capacity > most:
                refuse(f"rotary embeddings of type {kind!r} change after {most} tokens")
        elif kind not in STATIC_ROPE:
            refuse(f"rotary embeddings are of type {kind!r}")
        probe = torch.empty(0, dtype=torch.float32, device="cpu")
        positions = torch.arange(self.capacity, device="cpu").unsqueeze(0)
        cos, sin = self.rotary(probe, positions, *([layer_type] if several else []))
        if cos.shape[-1] != head_dim and not (self.partial and cos.shape[-1] < head_dim):
            refuse(f"{cos.shape[-1]} numbers of a head of {head_dim} would be rotated")
        half = cos.shape[-1] // 2  # the second half repeats the first
        return self.native.Rotary(
            cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous(), self.neighbours
        )


def offset_of(positions: Any, classes: Classes, capacity: int) -> int:
    """The row of a table of learned positions that the first token gets.

    Args:
        positions: the module.
        classes: the classes that transformers defines for the model.
        capacity: number of positions that are needed.

    Raises:
        BackendUnavailable: the module is of an unknown class, or has too few rows.
    """
    if type(positions) is nn.Embedding:
        offset = 0
    else:
        expect(positions, classes.named(LEARNED), "the positions", ())
        offset = int(positions.offset)
    if positions.weight.shape[0] < offset + capacity:
        refuse(f"the model has fewer than {capacity} positions")
    return offset


def of_bloom(body: Any, classes: Classes, capacity: int) -> Tensor:
    """Biases of Bloom (ALiBi), from its own function; what `Biases` is."""
    biases: Tensor = classes.home.build_alibi_tensor(
        _everything(capacity), body.num_heads, torch.float32
    )
    return biases.view(body.num_heads, capacity)


def of_falcon(body: Any, classes: Classes, capacity: int) -> Tensor:
    """Biases of Falcon (ALiBi), which are rounded to bfloat16 and scaled; what `Biases` is.

    Raises:
        BackendUnavailable: attention is another function, which adds them in another way.
    """
    if body.config._attn_implementation != "sdpa":
        refuse("attention with ALiBi is not 'sdpa'")
    scale = math.sqrt(body.config.hidden_size // body.num_heads)
    return of_bloom(body, classes, capacity) / scale


def _everything(capacity: int) -> Tensor:
    """A mask that shows every token."""
    return torch.ones(1, capacity, dtype=torch.int64, device="cpu")
