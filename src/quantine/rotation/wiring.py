"""`Wiring`: which parts of a model read and write its hidden states, and where values are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from quantine.core.transform_spec import ROTATE
from quantine.errors import FamilyError
from quantine.families.family import Family, Link
from quantine.families.layers import block_list

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BEFORE_MATRICES: Final = ("R1", "R4")
"""Reorders whose producers are norms of hidden states, and whose consumers read what these norm."""
INTO_HIDDEN_STATES: Final = ("R3", "R5")
"""Reorders whose consumers add to hidden states."""
VALUES: Final = "R3"
"""The reorder of values."""


@dataclass(frozen=True)
class BlockWiring:
    """What a rotation has to know of a block; all paths are inside it.

    Attributes:
        readers: norms of hidden states, each with the paths of the matrices that read what it puts
            out. A path may be that of a module of experts
            (`quantine.families.experts.Experts`): all of them read, and what they write is added
            to hidden states.
        writers: matrices whose outputs are added to hidden states.
        values: the reorder of values; ``None`` where values stay as they are.
    """

    readers: tuple[tuple[str, tuple[str, ...]], ...]
    writers: tuple[str, ...]
    values: Link | None


@dataclass(frozen=True)
class Wiring:
    """What a rotation has to know of a model.

    Attributes:
        family: its architecture; whoever wired the model knows the field ``key_heads``.
        blocks: of its decoder blocks.
        tables: paths of the tables that are added up to the first hidden states.
        final_norm: path of the norm before the head.
        untouched: names of parameters that a rotation leaves as they are.
    """

    family: Family
    blocks: tuple[BlockWiring, ...]
    tables: tuple[str, ...]
    final_norm: str
    untouched: frozenset[str] = frozenset()

    def norms(self) -> Iterator[str]:
        """Full paths of all norms of hidden states."""
        for index, block in enumerate(self.blocks):
            yield from (f"{self.family.blocks}.{index}.{norm}" for norm, _ in block.readers)
        yield self.final_norm


def described_wiring(model: PreTrainedModel, family: Family, config: PretrainedConfig) -> Wiring:
    """The wiring of a model whose family says where its norms are, by its links.

    Args:
        model: only its structure matters.
        family: with ``final_norm`` and links.
        config: the configuration of the model.

    Raises:
        FamilyError: the configuration asks for others than these links, or a matrix of a block is
            none that reads or writes hidden states.
    """
    unmet = family.unmet_need(config)
    if unmet is not None:
        raise FamilyError(f"hidden states can be rotated {unmet}: leave out `{ROTATE}`")
    count = len(block_list(model, family))
    block = _described_block(family)
    for index in range(count):
        _check_matrices(family, index, block)
    untouched = {
        f"{family.blocks}.{index}.{path}{end}"
        for index in range(count)
        for path in family.untouched
        for end in ("", ".weight", ".bias")
    }
    tables = tuple(filter(None, (family.embedding, family.positions)))
    return Wiring(family, (block,) * count, tables, family.final_norm, frozenset(untouched))


def _described_block(family: Family) -> BlockWiring:
    links = family.links
    return BlockWiring(
        tuple(
            (link.producers[0], link.consumers) for link in links if link.kind in BEFORE_MATRICES
        ),
        tuple(p for link in links if link.kind in INTO_HIDDEN_STATES for p in link.consumers),
        next((link for link in links if link.kind == VALUES), None),
    )


def _check_matrices(family: Family, index: int, block: BlockWiring) -> None:
    """Check that each matrix of block number ``index`` either reads or writes hidden states.

    Raises:
        FamilyError: one does not, or does both.
    """
    read = {path for _, readers in block.readers for path in readers}
    written = set(block.writers)
    matrices = {path for group in family.groups_in(index) for path in group}
    if matrices != read | written or read & written:
        odd = min(matrices ^ (read | written), default="")
        raise FamilyError(
            f"{family.blocks}.{index}.{odd} is no matrix that reads or writes hidden states as "
            f"others do: leave out `{ROTATE}`"
        )
