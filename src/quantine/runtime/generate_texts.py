"""Generating several texts together, a token of each with one look at the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quantine.runtime.decoder import Batch
from quantine.runtime.sampling import Sampler, Sampling

TOGETHER: Final = 64
"""Texts that are generated together at most: rows of one pass over the weights."""


def continue_together(
    batch: Batch,
    prompts: Sequence[Tensor],
    tokens: int,
    sampling: Sampling,
    ends: frozenset[int],
) -> Iterator[tuple[int, int]]:
    """Generate token ids after each of several prompts, up to an end token, which is left out.

    The tokens of each text are those that it would get alone. Where there are more prompts than
    the batch has texts, the others begin when texts end.

    Args:
        batch: which has seen no tokens, with room for each prompt and its new tokens.
        prompts: ``[n]`` int64 token ids each, on the CPU.
        tokens: largest number of tokens to generate for each.
        sampling: how they are chosen; each text has a random generator of its own.
        ends: token ids that end a text.

    Yields:
        The place of a prompt, and the next token after it.
    """
    waiting = enumerate(prompts)
    free = list(range(len(batch.texts)))
    arrived: list[tuple[_Going, Tensor]] = []
    while True:
        while free and (following := next(waiting, None)) is not None:
            place, prompt = following
            text = batch.texts[slot := free.pop()]
            text.reset()
            arrived.append((_Going(place, slot, Sampler(sampling)), text.append(prompt)))
        if not arrived:
            return
        going = []
        for one, logits in arrived:
            one.token = one.sampler.choose(logits)
            if one.token in ends:
                free.append(one.slot)
                continue
            yield one.place, one.token
            one.made += 1
            if one.made == tokens:
                free.append(one.slot)
            else:
                going.append(one)
        arrived = list(zip(going, _step(batch, going), strict=True)) if going else []


@dataclass
class _Going:
    """A text that is being generated.

    Attributes:
        place: of its prompt.
        slot: of its text in the batch.
        sampler: its own.
        token: the last one.
        made: number of tokens.
    """

    place: int
    slot: int
    sampler: Sampler
    token: int = 0
    made: int = 0


def _step(batch: Batch, going: Sequence[_Going]) -> Tensor:
    tokens = torch.tensor([one.token for one in going], dtype=torch.int64, device="cpu")
    return batch.step([one.slot for one in going], tokens)
