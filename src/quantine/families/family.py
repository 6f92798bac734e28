"""Architectures as data: the matrices of a decoder block, and which of them share an input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Fold = Literal["weights", "gather", "attention"]
"""Name of a way to build a reorder into a block, see `Link.fold`."""
Rows = Literal["parts", "last", "interleaved"]
"""Name of the rows of a matrix that write the reordered channels, see `Link.rows`."""


@dataclass(frozen=True)
class Link:
    """A reorder of channels (RPTQ, arXiv 2304.01089): which modules write and which read them.

    Attributes:
        kind: ``"R1"`` to ``"R5"``, see `quantine.core.activation_spec.REORDERS`.
        fold: how the order gets into the block. ``"weights"``: rows and biases of the producers are
            permuted. ``"gather"``: the producer is a norm, which then writes its output in the new
            order. In both cases the columns of the consumers are permuted, too. ``"attention"``:
            nothing is moved, as rotary embeddings fix the places of queries and keys; the cluster
            of each channel is looked up instead.
        producers: paths, inside a block, of the modules that write the channels.
        consumers: paths of the matrices that read them; these may read several copies of each head.
        per_head: whether channels stay in their attention heads.
        rows: which rows of a producer write the channels, if it has more rows than there are
            channels. ``"parts"``: all rows, in as many parts as fit, each of which gets the order
            (gate and up in one matrix). ``"last"``: the last rows (values after all queries and
            keys). ``"interleaved"``: the last rows of each head (values after that head's query and
            key).
    """

    kind: str
    fold: Fold
    producers: tuple[str, ...]
    consumers: tuple[str, ...] = ()
    per_head: bool = False
    rows: Rows = "parts"


@dataclass(frozen=True)
class Family:
    """One architecture: where the decoder blocks of a model are and what they consist of.

    Attributes:
        name: short name, also that of the module which describes it.
        model_types: the values of ``model_type`` in ``config.json`` that this family covers.
        blocks: path of the list of decoder blocks.
        groups: paths of the matrices inside a block, in running order. The matrices of one group
            read the same input and are solved before anything that depends on them. Ask
            `groups_in`, since blocks of one model may differ.
        embedding: path of the token embedding.
        head: path of the output head.
        outputs: number of values in the tuples or lists that blocks return, of which hidden states
            are the first; 0 where they return hidden states alone.
        links: the reorders that leave a block's function unchanged; empty where they are not known.
        links_need: fields of ``config.json`` with the values without which ``links`` are wrong.
        attention: path, inside a block, of the module that transformers hands to attention
            functions. Empty where activations cannot be quantized, because it hands none or support
            is missing.
        key_heads: field of the configuration with the number of heads of keys and values; empty
            where there are as many as heads of queries.
        block_groups: the groups of every block where blocks differ; else empty.
        kept: parameters of two or more dimensions inside of blocks that stay in 16 bit, as pairs
            of the path inside the block and why.
        fixed: the embedding or the head, where it cannot be quantized, as pairs of its path and why
            not.
        final_norm: path of the norm between the last block and the head; empty where
            `quantine.rotation.derived` finds out how hidden states can be rotated.
        positions: path of the table of positions that is added to the embedding; empty if there is
            none.
        untouched: paths, inside a block, of norms or parameters that see single heads of queries
            and keys only, so that rotating hidden states and values leaves them as they are.
        experts: paths, inside blocks, of the modules that hold experts, see
            `quantine.families.experts.Experts`.
        block_links: the links of every block where blocks differ; else empty.
        block_attention: the path ``attention`` of every block where blocks differ; else empty.
        left: what is not rounded where activations are, as triples of the number of the block, the
            path inside it, and why. Only families that `quantine.activations.linked` found have
            such.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    groups: tuple[tuple[str, ...], ...]
    embedding: str
    head: str = "lm_head"
    outputs: int = 0
    links: tuple[Link, ...] = ()
    links_need: tuple[tuple[str, object], ...] = ()
    attention: str = "self_attn"
    key_heads: str = "num_key_value_heads"
    block_groups: tuple[tuple[tuple[str, ...], ...], ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    fixed: tuple[tuple[str, str], ...] = ()
    experts: tuple[str, ...] = ()
    block_links: tuple[tuple[Link, ...], ...] = ()
    block_attention: tuple[str, ...] = ()
    left: tuple[tuple[int, str, str], ...] = ()
    final_norm: str = ""
    positions: str = ""
    untouched: tuple[str, ...] = ()

    def groups_in(self, block: int) -> tuple[tuple[str, ...], ...]:
        """The groups of block number ``block``, in the form of the attribute ``groups``."""
        return self.block_groups[block] if self.block_groups else self.groups

    def in_block(self, block: int) -> Family:
        """The family as block number ``block`` has it: its groups, links and attention."""
        if not (self.block_groups or self.block_links):
            return self
        return replace(
            self,
            groups=self.groups_in(block),
            links=self.block_links[block] if self.block_links else self.links,
            attention=self.block_attention[block] if self.block_attention else self.attention,
            block_groups=(),
            block_links=(),
            block_attention=(),
        )

    def leaves(self, name: str) -> bool:
        """Whether the input of the module ``name`` (in full) is left alone: see ``left``."""
        left = (f"{self.blocks}.{index}.{path}" for index, path, _ in self.left)
        return any(name == one or name.startswith(f"{one}.") for one in left)

    def unmet_need(self, config: object) -> str | None:
        """Which field of ``links_need`` is another in ``config``, and how; ``None`` if none is."""
        for field, value in self.links_need:
            if getattr(config, field) != value:
                return f"only where {field} is {value}, not {getattr(config, field)}"
        return None

    @property
    def attends(self) -> bool:
        """Whether attention of at least one block can round what it reads."""
        return any((self.attention, *self.block_attention))

    @property
    def is_linked(self) -> bool:
        """Whether something in at least one block can be reordered or rounded."""
        return any((self.links, *self.block_links))
