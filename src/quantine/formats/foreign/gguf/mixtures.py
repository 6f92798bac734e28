"""What llama.cpp makes of the name of a type: which type each matrix of a model gets.

The names with an ending (``Q4_K_M``) are mixtures: most matrices have one type, and those that cost
most to round have more bits. Where a row is no whole number of blocks, another type stands in. It
is what the quantizer of llama.cpp (2026, llama-cpp-python 0.3.36) does with an importance matrix
and a model without experts, so that files are as large as its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from quantine.errors import PlanError, cut
from quantine.formats.foreign.gguf.grid_types import GRID_TYPES, GridType
from quantine.formats.foreign.gguf.metadata import heads_of_keys


@dataclass(frozen=True)
class Build:
    """What of a model decides the types of its matrices.

    Attributes:
        architecture: as llama.cpp calls it.
        blocks: number of its blocks.
        shared: number of heads of queries that read one head of keys and values.
    """

    architecture: str
    blocks: int
    shared: int

    @classmethod
    def of(cls, architecture: str, config: Any, blocks: int) -> Build:
        """That of a model with this configuration."""
        return cls(architecture, blocks, config.num_attention_heads // heads_of_keys(config))

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes it for Llama 2 70B, or for Qwen2 72B."""
        if self.blocks != BLOCKS_OF_70B:
            return False
        return self.architecture == "qwen2" or (self.architecture == "llama" and self.shared > 1)


Choice = Callable[[int, Build], str]
"""The type of a matrix in block ``i``."""

STANDS_IN: Final = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""The types of 32 weights that stand in for those of 256."""
BLOCKS_OF_70B: Final = 80
"""Number of blocks by which llama.cpp knows these models."""
IN_70B: Final = {"Q3_K": "Q5_K", "Q4_K": "Q5_K"}
"""Types of projections to values there, which are small, by what they would be elsewhere."""
MUCH_SHARED: Final = 4
"""Number of heads of queries from which on heads of values get more bits."""


@dataclass(frozen=True)
class Mixture:
    """The types of a model's matrices.

    Attributes:
        most: of all that have no other.
        value, output, down: of the projections to values, from attention, and out of the block's
            wide part. One projection to queries, keys and values is one to values.
        head: of the head, or of the table that is one.
    """

    most: str
    value: Choice | None = None
    output: Choice | None = None
    down: Choice | None = None
    head: str = "Q6_K"


def _always(name: str) -> Choice:
    return lambda i, build: name


def _where_shared(name: str, others: str) -> Choice:
    return lambda i, build: name if build.shared >= MUCH_SHARED else others


def _first(count: int, name: str, others: str) -> Choice:
    return lambda i, build: name if i < count else others


def _first_share(parts: int, name: str, others: Choice) -> Choice:
    return lambda i, build: name if i < build.blocks // parts else others(i, build)


def _outer_and_thirds(name: str, others: str) -> Choice:
    """The first and last eighth of the blocks, and every third of those between."""

    def chosen(i: int, build: Build) -> str:
        n = build.blocks
        outer = i < n // 8 or i >= 7 * n // 8
        return name if outer or (i - n // 8) % 3 == 2 else others

    return chosen


MIXTURES: Final = {
    **{name: Mixture(name) for name in ("Q4_1", "Q5_1", "Q6_K")},
    "Q8_0": Mixture("Q8_0", head="Q8_0"),
    "Q4_0": Mixture("Q4_0", down=_first_share(8, "Q4_1", _always("Q4_0"))),
    "Q5_0": Mixture("Q5_0", down=_first_share(8, "Q5_1", _always("Q5_0"))),
    "Q2_K": Mixture("Q2_K", _where_shared("Q4_K", "Q3_K"), _always("Q3_K"), _always("Q3_K")),
    "Q3_K_S": Mixture("Q3_K"),
    "Q3_K_M": Mixture(
        "Q3_K",
        _first(2, "Q5_K", "Q4_K"),
        _always("Q4_K"),
        _first_share(16, "Q5_K", _always("Q4_K")),
    ),
    "Q4_K_S": Mixture(
        "Q4_K", _first(4, "Q5_K", "Q4_K"), None, _first_share(8, "Q5_K", _always("Q4_K"))
    ),
    "Q4_K_M": Mixture(
        "Q4_K", _outer_and_thirds("Q6_K", "Q4_K"), None, _outer_and_thirds("Q6_K", "Q4_K")
    ),
    "Q5_K_S": Mixture("Q5_K"),
    "Q5_K_M": Mixture(
        "Q5_K", _outer_and_thirds("Q6_K", "Q5_K"), None, _outer_and_thirds("Q6_K", "Q5_K")
    ),
}
"""Mixtures, and types alone, by the names that llama.cpp has for files of them."""
DOWN_IN_FALCON: Final[Mapping[str, Choice | None]] = {
    "Q3_K_M": _first_share(16, "Q5_K", _outer_and_thirds("Q4_K", "Q3_K")),
    "Q4_K_S": None,
    "Q4_K_M": _first_share(16, "Q6_K", _outer_and_thirds("Q5_K", "Q4_K")),
}
"""What differs there in the projections out of the wide part, by the mixture's name."""


def mixture_named(name: str, architecture: str) -> Mixture:
    """The mixture that llama.cpp calls ``name`` for models of ``architecture``.

    Raises:
        PlanError: there is none, or its types are no grids.
    """
    if name not in MIXTURES:
        said = "llama.cpp: lacks the type"
        if name.strip():
            said = f"there is no target llama.cpp:{cut(name)}"
        raise PlanError(f"{said}: after the colon comes one of {', '.join(MIXTURES)}")
    usual = MIXTURES[name]
    if architecture != "falcon":
        return usual
    return replace(usual, output=None, down=DOWN_IN_FALCON.get(name, usual.down), head="Q8_0")


def type_in(
    mixture: Mixture, stored: str, width: int, build: Build, is_head: bool
) -> GridType | None:
    """The type of one matrix; ``None`` where it stays in floats, as no type's blocks divide it.

    Args:
        mixture: of `mixture_named`.
        stored: llama.cpp's name of the matrix, such as ``blk.0.attn_v.weight``.
        width: number of its inputs.
        build: of the model.
        is_head: whether it is the head, or the table that is one.
    """
    name = mixture.head if is_head else mixture.most
    if not is_head and stored.startswith("blk."):
        name = _in_block(mixture, stored, build)
    found = GRID_TYPES[name]
    if width % found.weights and name in STANDS_IN:
        found = GRID_TYPES[STANDS_IN[name]]
    return None if width % found.weights else found


def _in_block(mixture: Mixture, stored: str, build: Build) -> str:
    """Name of the type of a matrix in a block."""
    number, kind = stored.removeprefix("blk.").removesuffix(".weight").split(".")
    choices: Mapping[str, Choice | None] = {
        "attn_v": mixture.value,
        "attn_qkv": mixture.value,
        "attn_output": mixture.output,
        "ffn_down": mixture.down,
    }
    choice = choices.get(kind)
    name = mixture.most if choice is None else choice(int(number), build)
    return IN_70B.get(name, name) if build.is_70b and kind in {"attn_v", "attn_qkv"} else name
