"""Families with the reorders of activations: as described, or else found and proved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from torch import Tensor

from quantine.activations.attention import NAME, register
from quantine.activations.proof import SAME, Proof
from quantine.core.ambient import own_state
from quantine.errors import FamilyError
from quantine.families import described_family, is_described
from quantine.families.derivation.derive import Study, study
from quantine.families.derivation.links import (
    Reading,
    hidden_links,
    is_norm,
    queries_and_keys,
    readings_of,
    value_links,
)
from quantine.families.derivation.one_by_one import block_calls, run
from quantine.families.experts import experts_in
from quantine.families.family import Family, Link
from quantine.families.heads import Heads

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KEY_HEADS: Final = ("num_key_value_heads", "num_kv_heads", "")
"""What a configuration may call its number of heads of keys, as `Family.key_heads`."""
NO_NORM: Final = "what it reads is not written by a norm of its block"
"""Why the input of a block's first matrices is not rounded."""
MORE_READERS: Final = "what it reads cannot be reordered: it is read elsewhere, too"
"""Why the output of a norm is not rounded."""
UNPROVED: Final = "what it reads cannot be reordered without a change of what the block computes"
"""Why the input of a later matrix is not rounded."""
ONE_OF_A_KIND: Final = "its block has another reorder of the same kind"
"""Why only the first of several inputs of a kind is rounded."""
EXPERTS: Final = "inputs of experts are not rounded yet"
"""Why nothing inside of experts is rounded."""
ATTENTION: Final = "its attention computes in a way of its own"
"""Why queries, keys, values and probabilities are not rounded."""


def linked_family(config: PretrainedConfig) -> Family:
    """The family of a model with its links, if there are any: as described, or as `derive_links`.

    Args:
        config: the model's configuration in transformers, which is not changed.

    Raises:
        FamilyError: it is not understood.
    """
    if is_described(config.model_type):
        family = described_family(config.model_type)
        if family.links:
            return family
    return derive_links(config)


@own_state()
def derive_links(config: PretrainedConfig) -> Family:
    """Find the family of a model, and the reorders that its blocks allow.

    A small random model of it shows what its matrices read, and so which reorders there may be.
    Each is then tried: in a block that is reordered on both sides, the output stays the same, on
    one side it does not. What is not proved in this way is named in `Family.left`, and left alone.

    Raises:
        FamilyError: the model is not understood; the message says what of it.
    """
    return _Linking(study(config)).family()


@dataclass
class _Found:
    """What was found of one block: links by kind, its attention, and what is left alone."""

    links: dict[str, Link]
    attention: str
    left: dict[str, str]


class _Linking:
    """The links of a studied model, found block by block."""

    def __init__(self, studied: Study) -> None:
        self._model, self._trace, self._bare = studied.model, studied.trace, studied.family
        self._tokens = studied.tokens[0]

    def family(self) -> Family:
        """The family with all links that hold.

        Raises:
            FamilyError: all together change what the model computes.
        """
        expected, own = self._logits(), self._model.config._attn_implementation
        for field in KEY_HEADS:
            self._bare = replace(self._bare, key_heads=field)
            proofs = self._proofs()
            found = [self._of_block(index, proof) for index, proof in enumerate(proofs)]
            if self._attends_as_before(expected):
                for one, proof in zip(found, self._proofs(), strict=True):
                    _add_attention(one, proof)
            if not any(one.attention for one in found):
                self._model.set_attn_implementation(own)
            if any("R2" in one.links for one in found):
                break
            self._model.set_attn_implementation(own)
        family = self._with(found)
        for index, proof in enumerate(proofs):
            for link in family.in_block(index).links:
                proof.rewrite(proof.call.block, link)
        if _difference(self._logits(), expected) > 10 * SAME:
            raise FamilyError(
                f"activations of {self._bare.name} models cannot be quantized: reorders that hold "
                "in every block change the model"
            )
        return family

    def _proofs(self) -> list[Proof]:
        calls, config = block_calls(self._model, self._bare, self._tokens), self._model.config
        try:
            width = Heads.width(config)
        # It has words of its own for that, or (RuntimeError) blocks whose heads differ.
        except (AttributeError, TypeError, ZeroDivisionError, RuntimeError):
            width = 0
        return [Proof(call, Heads.of(config, self._bare), width) for call in calls]

    def _of_block(self, index: int, proof: Proof) -> _Found:
        block = proof.call.block
        prefix = f"{self._bare.blocks}.{index}"
        readings = readings_of(block, prefix, dict(self._bare.kept), self._trace)
        found = _Found({}, "", dict.fromkeys(experts_in(block), EXPERTS))
        normed = [number for number, one in enumerate(readings) if is_norm(block, one)]
        for number, reading in enumerate(readings):
            if number in normed:
                continue
            candidates = [*hidden_links(readings, number)]
            if proof.width:
                candidates += value_links(readings, number, proof.heads)
            link = next(filter(proof.holds, candidates), None)
            if link is not None and link.kind == "R3":
                found.links.setdefault("R2", _queries(readings, link, proof))
            why = UNPROVED if number and not reading.writer else NO_NORM
            _take(found, reading, link, why if candidates else NO_NORM)
        for number, kind in _kinds(readings, normed, found.links.get("R5")):
            reading = readings[number]
            kind = "R4" if kind in found.links and kind == "R1" else kind
            link = Link(kind, "gather", (reading.writer,), reading.paths)
            _take(found, reading, link if proof.holds(link) else None, MORE_READERS)
        return found

    def _attends_as_before(self, expected: Tensor) -> bool:
        """Whether the model computes the same with quantine's function for attention."""
        register()
        try:
            self._model.set_attn_implementation(NAME)
            return _difference(self._logits(), expected) <= SAME
        except (FamilyError, ValueError):  # of transformers, which knows that it would not
            return False

    def _logits(self) -> Tensor:
        logits: Tensor = run(self._model, self._tokens).logits
        return logits

    def _with(self, found: list[_Found]) -> Family:
        links = tuple(tuple(one.links[kind] for kind in sorted(one.links)) for one in found)
        left = [
            (index, path, why) for index, one in enumerate(found) for path, why in one.left.items()
        ]
        return replace(
            self._bare,
            links=(),
            attention="",
            block_links=links,
            block_attention=tuple(one.attention for one in found),
            left=tuple(left),
        )


def _kinds(
    readings: list[Reading], normed: list[int], hidden: Link | None
) -> Iterator[tuple[int, str]]:
    """Numbers of the readings that norms wrote, and of which kind a reorder of each would be.

    A block ends with its MLP, in whose middle there may be a norm. What is left for the first norm
    is R1.
    """
    last = len(readings) - 1
    inner = hidden is None and last > 0 and last in normed
    first = readings[last - 1].paths if inner else hidden.producers if hidden else ()
    mlp = [number for number in normed if {*readings[number].paths} <= {*first}]
    yield from ((number, "R4") for number in mlp)
    yield from ((last, "R5") for _ in range(inner))
    yield from ((n, "R1") for n in normed if n not in mlp and not (inner and n == last))


def _take(found: _Found, reading: Reading, link: Link | None, why: str) -> None:
    """Add a link that was proved, or say why what ``reading`` reads is left alone."""
    if link is not None and link.kind in found.links:
        why = ONE_OF_A_KIND
    elif link is not None:
        found.links[link.kind] = link
        return
    found.left.update(dict.fromkeys(reading.paths, why))


def _queries(readings: list[Reading], values: Link, proof: Proof) -> Link:
    """The reorder of queries and keys: in their matrices, where nothing fixes their places."""
    producers = queries_and_keys(readings, values)
    moved = Link("R2", "weights", producers, per_head=True)
    return moved if len(producers) == 2 and proof.holds(moved) else replace(moved, fold="attention")


def _add_attention(found: _Found, proof: Proof) -> None:
    """Let a block's attention round what it reads, if it can."""
    path = proof.attention() if proof.width else ""
    if path and proof.attends(path, found.links.get("R3")):
        found.attention = path
        for kind in ("R2", "R3"):  # of channels that stay where they are, only clusters are known
            found.links.setdefault(kind, Link(kind, "attention", (), per_head=True))


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
