"""Architectures as data: which matrices a decoder block holds, and which of them share an input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fold = Literal["weights", "gather", "attention"]
Rows = Literal["parts", "last", "interleaved"]


@dataclass(frozen=True)
class Link:
    """One reorder of channels (RPTQ, arXiv 2304.01089): who writes them, and who reads them.

    Attributes:
        kind: ``"R1"`` to ``"R5"``, see `quantine.core.activation_spec.REORDERS`.
        fold: how the order gets into the block. ``"weights"``: rows and biases of the producers are
            permuted. ``"gather"``: the producer is a norm, which writes the new order. Either way
            the consumers' columns follow. ``"attention"``: nothing moves, clusters are looked up
            for each channel, as rotary embeddings fix the places of queries and keys.
        producers, consumers: paths inside a block; consumers may have copies of each head.
        per_head: channels stay in their heads.
        rows: which rows of a producer are meant, where it has more than there are channels.
            ``"parts"``: as many parts as fit, all of which get the order (gate and up in one
            matrix). ``"last"``: the last ones (values after all queries and keys).
            ``"interleaved"``: the last ones of each head (values after that head's query and key).
    """

    kind: str
    fold: Fold
    producers: tuple[str, ...]
    consumers: tuple[str, ...] = ()
    per_head: bool = False
    rows: Rows = "parts"


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: short name, also the file's.
        model_types: values of ``model_type`` in ``config.json`` that this row covers.
        blocks: path of the list of decoder blocks.
        groups: paths inside a block, in running order; the matrices of one group read the same
            input and are solved before anything that depends on them. Ask `groups_in`: blocks of
            one model may differ.
        embedding: path of the token embedding.
        head: path of the output head.
        returns_tuple: blocks return ``(hidden, ...)`` instead of the hidden states alone.
        renames: ``(old, new)`` prefixes of tensor names in older checkpoints.
        links: the reorders that leave a block's function as it is; none where they are not known.
        links_need: fields of ``config.json`` and the values without which ``links`` are wrong.
        attention: path inside a block of the module that transformers hands to attention functions;
            empty where activations cannot be quantized, because it hands none, or for now.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    groups: tuple[tuple[str, ...], ...]
    embedding: str
    head: str = "lm_head"
    returns_tuple: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    links: tuple[Link, ...] = ()
    links_need: tuple[tuple[str, object], ...] = ()
    attention: str = "self_attn"

    def groups_in(self, block: int) -> tuple[tuple[str, ...], ...]:
        """The groups of block number ``block``; see the attribute ``groups``."""
        return self.groups
