"""What llama.cpp makes of the name of a type: which type each matrix of a model gets.

The names with an ending (``Q4_K_M``) are mixtures: most matrices have one type, and those that cost
most to round have more bits. Where a row is no whole number of blocks, another type stands in. It
is what the quantizer of llama.cpp (2026, llama-cpp-python 0.3.36) does with an importance matrix
and a model without experts, so that files are as large as its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from quantine.errors import PlanError, shown
from quantine.formats.foreign.gguf.grid_types import GRID_TYPES, GridType

Choice = Callable[[int, int], str]
"""The type of a matrix in block ``i`` of ``n``."""

STANDS_IN: Final = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""The types of 32 weights that stand in for those of 256."""
HEAD: Final = "Q6_K"
"""Type of the head, or of the table that is one, in every file but one of ``Q8_0``."""


@dataclass(frozen=True)
class Mixture:
    """The types of a model's matrices.

    Attributes:
        most: of all that have no other.
        value, output, down: of the projections to values, from attention, and out of the block's
            wide part.
        fused: of one projection to queries, keys and values.
    """

    most: str
    value: Choice | None = None
    output: Choice | None = None
    down: Choice | None = None
    fused: Choice | None = None


def _always(name: str) -> Choice:
    return lambda i, n: name


def _first(count: int, name: str, others: str) -> Choice:
    return lambda i, n: name if i < count else others


def _first_share(parts: int, name: str, others: str) -> Choice:
    return lambda i, n: name if i < n // parts else others


def _outer_and_thirds(name: str, others: str) -> Choice:
    """The first and last eighth of the blocks, and every third of those between."""

    def chosen(i: int, n: int) -> str:
        outer = i < n // 8 or i >= 7 * n // 8
        return name if outer or (i - n // 8) % 3 == 2 else others

    return chosen


MIXTURES: Final = {
    **{name: Mixture(name) for name in ("Q4_1", "Q5_1", "Q8_0", "Q6_K")},
    "Q4_0": Mixture("Q4_0", down=_first_share(8, "Q4_1", "Q4_0")),
    "Q5_0": Mixture("Q5_0", down=_first_share(8, "Q5_1", "Q5_0")),
    "Q2_K": Mixture("Q2_K", _always("Q3_K"), _always("Q3_K"), _always("Q3_K")),
    "Q3_K_S": Mixture("Q3_K"),
    "Q3_K_M": Mixture(
        "Q3_K",
        _first(2, "Q5_K", "Q4_K"),
        _always("Q4_K"),
        _first_share(16, "Q5_K", "Q4_K"),
        _always("Q4_K"),
    ),
    "Q4_K_S": Mixture("Q4_K", _first(4, "Q5_K", "Q4_K"), None, _first_share(8, "Q5_K", "Q4_K")),
    "Q4_K_M": Mixture(
        "Q4_K",
        _outer_and_thirds("Q6_K", "Q4_K"),
        None,
        _outer_and_thirds("Q6_K", "Q4_K"),
        _always("Q5_K"),
    ),
    "Q5_K_S": Mixture("Q5_K"),
    "Q5_K_M": Mixture(
        "Q5_K",
        _outer_and_thirds("Q6_K", "Q5_K"),
        None,
        _outer_and_thirds("Q6_K", "Q5_K"),
        _always("Q6_K"),
    ),
}
"""Mixtures, and types alone, by the names that llama.cpp has for files of them."""


def mixture_named(name: str) -> Mixture:
    """The mixture that llama.cpp calls ``name``.

    Raises:
        PlanError: there is none, or its types are no grids.
    """
    if name not in MIXTURES:
        raise PlanError(f"there is no target llama.cpp:{shown(name)}: {', '.join(MIXTURES)} are")
    return MIXTURES[name]


def type_in(
    mixture: Mixture, stored: str, width: int, blocks: int, is_head: bool
) -> GridType | None:
    """The type of one matrix; ``None`` where it stays in floats, as no type's blocks divide it.

    Args:
        mixture: of `mixture_named`.
        stored: llama.cpp's name of the matrix, such as ``blk.0.attn_v.weight``.
        width: number of its inputs.
        blocks: number of blocks of the model.
        is_head: whether it is the head, or the table that is one.
    """
    name = mixture.most
    kind = stored.removesuffix(".weight").rpartition(".")[2]
    if is_head:
        name = name if name == "Q8_0" else HEAD
    elif stored.startswith("blk."):
        choices: Mapping[str, Choice | None] = {
            "attn_v": mixture.value,
            "attn_output": mixture.output,
            "ffn_down": mixture.down,
            "attn_qkv": mixture.fused,
        }
        choice = choices.get(kind)
        name = name if choice is None else choice(int(stored.split(".")[1]), blocks)
    found = GRID_TYPES[name]
    if width % found.weights and name in STANDS_IN:
        found = GRID_TYPES[STANDS_IN[name]]
    return None if width % found.weights else found
