"""Architectures as data: which matrices a decoder block holds, and which of them share an input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from quantine.errors import FamilyError

if TYPE_CHECKING:
    from collections.abc import Iterator

Role = Literal["block", "embedding", "head"]
Fold = Literal["weights", "gather", "attention"]
Rows = Literal["parts", "last", "interleaved"]


@dataclass(frozen=True)
class Link:
    """One reorder of channels (RPTQ, arXiv 2304.01089): who writes them, and who reads them.

    Attributes:
        kind: ``"R1"`` to ``"R5"``, see `quantine.core.activation.KINDS`.
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
            input and are solved before anything that depends on them.
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


@dataclass(frozen=True)
class Layer:
    """One matrix that a plan can quantize.

    Attributes:
        name: full path of its module.
        out_features, in_features: its shape as ``[out, in]``; an embedding is ``[rows, width]``.
        role: inside a decoder block, token embedding, or output head.
        block: index of its block, ``None`` outside of blocks.
        group: index into ``Family.groups``, ``None`` outside of blocks.
        transposed: the module stores ``[in, out]`` (GPT-2's Conv1D).
    """

    name: str
    out_features: int
    in_features: int
    role: Role
    block: int | None = None
    group: int | None = None
    transposed: bool = False

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


def block_list(model: nn.Module, family: Family) -> nn.ModuleList:
    """The list of decoder blocks of ``model``."""
    blocks = model.get_submodule(family.blocks)
    if not isinstance(blocks, nn.ModuleList):
        raise FamilyError(f"{family.blocks} is a {type(blocks).__name__}, not a list of blocks")
    return blocks


def find_layers(model: nn.Module, family: Family) -> list[Layer]:
    """Every matrix a plan may quantize, in running order; shapes only, ``model`` may be on meta.

    Raises:
        FamilyError: a block lacks a matrix the family names, or holds a parameter of two or more
            dimensions the family does not name (which would stay in 16 bit unnoticed).
    """
    embedding = model.get_submodule(family.embedding)
    layers = [Layer(family.embedding, *_shape(embedding, family.embedding), role="embedding")]
    for index, block in enumerate(block_list(model, family)):
        layers.extend(_block_layers(block, index, family))
    head = model.get_submodule(family.head)
    layers.append(Layer(family.head, *_shape(head, family.head), role="head"))
    return layers


def _block_layers(block: nn.Module, index: int, family: Family) -> Iterator[Layer]:
    prefix = f"{family.blocks}.{index}"
    modules = dict(block.named_modules())
    covered = {path for group in family.groups for path in group}
    for path, parameter in block.named_parameters():
        owner = path.rpartition(".")[0]
        if parameter.ndim >= 2 and owner not in covered:
            kind = type(modules[owner]).__name__
            raise FamilyError(
                f"{prefix}.{path} {tuple(parameter.shape)} in a {kind} is not covered by family "
                f"{family.name!r} (covered: {', '.join(sorted(covered))}). Fused or "
                "mixture-of-experts weights are not supported; docs/adding.md shows how to add "
                "a family."
            )
    for group, paths in enumerate(family.groups):
        for path in paths:
            name = f"{prefix}.{path}"
            if path not in modules:
                raise FamilyError(f"family {family.name!r} expects {name}, which does not exist")
            out_features, in_features = _shape(modules[path], name)
            transposed = is_transposed(modules[path])
            yield Layer(name, out_features, in_features, "block", index, group, transposed)


def is_transposed(module: nn.Module) -> bool:
    """Whether ``module`` stores its weight as ``[in, out]``."""
    return type(module).__name__ == "Conv1D"


def _shape(module: nn.Module, name: str) -> tuple[int, int]:
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear | nn.Embedding) and not is_transposed(module):
        raise FamilyError(f"{name} is a {type(module).__name__}, which cannot be quantized yet")
    if not isinstance(weight, nn.Parameter):
        raise FamilyError(f"{name} has no weight")
    rows, columns = weight.shape
    return (columns, rows) if is_transposed(module) else (rows, columns)
