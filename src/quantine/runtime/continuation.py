"""Texts that come and go while a model continues all of them, a step of each at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantine.runtime.decoder import Batch, Decoder
from quantine.runtime.generate import ModuleDecoder
from quantine.runtime.generate_texts import TOGETHER
from quantine.runtime.graph_decoder import StaticDecoder
from quantine.runtime.prompt_lookup import PromptLookup
from quantine.runtime.sampling import Sampler, Sampling

Made = list[int] | Exception
"""New tokens of a text, or what went wrong."""


class Continuation:
    """A text after a prompt, up to an end token, which is left out.

    The tokens are those of `quantine.runtime.generate.continue_tokens`, whatever else is continued
    meanwhile. Where the most likely ones are taken and a native decoder runs, some are guessed.

    Args:
        decoder: whatever it has seen is forgotten at the first step.
        place: of the decoder in its batch, if it has one.
        prompt: ``[n]`` int64 token ids, on the CPU.
        tokens: largest number of new ones, from 1.
        sampling: how they are chosen.
        ends: token ids that end a text.

    Attributes:
        begun: whether the model has seen the prompt.
        ended: whether nothing follows any more.
    """

    def __init__(
        self,
        decoder: Decoder | StaticDecoder | ModuleDecoder,
        place: int,
        prompt: Tensor,
        tokens: int,
        sampling: Sampling,
        ends: frozenset[int],
    ) -> None:
        self.decoder, self.place = decoder, place
        self.begun = self.ended = False
        self._prompt, self._left, self._ends = prompt, tokens, ends
        self._sampler = Sampler(sampling)
        guesses = isinstance(decoder, Decoder) and sampling.temperature == 0
        self._lookup = PromptLookup(prompt.tolist()) if guesses else None
        self._last = 0
        self._draft: list[int] = []

    def begin(self) -> list[int]:
        """Let the model see the prompt.

        Returns:
            The first token, or nothing if the text ends.
        """
        self.decoder.reset()
        self.begun = True
        return self.take(self.decoder.append(self._prompt).unsqueeze(0))

    def next_rows(self, most: int) -> list[int]:
        """What the model is to see next: the last token, and up to ``most - 1`` guesses."""
        if self._lookup is not None:
            self._draft = self._lookup.draft(min(most, self._left) - 1)
        return [self._last, *self._draft]

    def see(self, rows: list[int]) -> list[int]:
        """Let the model see what `next_rows` has said, of this text alone, and choose."""
        return self.take(self.decoder.append(_ids(rows)).unsqueeze(0))

    def take(self, logits: Tensor) -> list[int]:
        """Choose the next tokens, of which all but the last one were guessed.

        Args:
            logits: ``[rows, vocabulary]`` float32 after each of `next_rows`, which the decoder has
                seen; or after the prompt.
        """
        chosen = []
        for row, guess in zip(logits, [*self._draft, None], strict=True):
            chosen.append(self._sampler.choose(row))
            if chosen[-1] != guess:
                break
        if self._lookup is not None and isinstance(self.decoder, Decoder):
            wrong = len(self._draft) + 1 - len(chosen)
            self.decoder.truncate(self.decoder.position - wrong)
            if self._draft:
                self._lookup.judge(len(self._draft), len(chosen) - 1)
            self._lookup.add(chosen)
        self._draft, self._last = [], chosen[-1]
        for count, token in enumerate(chosen):
            if token in self._ends:
                self.ended = True
                return chosen[:count]
        self._left -= len(chosen)
        self.ended = self._left == 0
        return chosen


def advance(texts: Sequence[Continuation], batch: Batch | None) -> list[Made]:
    """Continue each of several texts that have not ended: by its first token, or by a step.

    Args:
        texts: with decoders of their own.
        batch: what their decoders belong to: then one look at the weights continues all that have
            begun. Without one, they are continued one after another.

    Returns:
        The new tokens of each: one, more where guesses were right, or none where it ends. Or what
        went wrong with that text, which cannot go on: others do.
    """
    new: dict[int, Made] = {}
    going = []
    for place, text in enumerate(texts):
        if text.begun:
            going.append((place, text, text.next_rows(max(1, TOGETHER // len(texts)))))
        else:
            new[place] = _attempt(text.begin)
    rows = [token for _, _, own in going for token in own]
    if batch is None or len(rows) == 1:
        for place, text, own in going:
            new[place] = _attempt(text.see, own)
    elif going:
        logits = batch.step([text.place for _, text, own in going for _ in own], _ids(rows))
        parts = logits.split([len(own) for _, _, own in going])
        for (place, text, _), part in zip(going, parts, strict=True):
            new[place] = _attempt(text.take, part)
    return [new[place] for place in range(len(texts))]


def _attempt(act: Callable[..., list[int]], *given: object) -> Made:
    try:
        return act(*given)
    except Exception as error:  # its client is told; others must not lose their answers by it
        return error


def _ids(tokens: list[int]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device="cpu")
