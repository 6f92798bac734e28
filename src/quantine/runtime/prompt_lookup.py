"""Guessing tokens from the text so far, and checking several guesses in one pass of the model.

Texts repeat themselves: code that is changed, documents that are quoted, names. Where the last
tokens have stood in the text before, those that followed then are tried, as in prompt lookup
decoding (docs/references.md). The model looks at all of them in one pass, and each that it would
have chosen is kept, so that the text is the same as token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import torch
from torch import Tensor

from quantine.runtime.decoder import Decoder, most_likely

ENDING: Final = 3
"""Tokens that must have stood in the text before: the last ones."""
FIRST: Final = 2
"""Tokens that are guessed at first, and again after a guess without any that was right."""
MOST: Final = 15
"""Tokens that are guessed at once at most: with the one before them, two blocks of 8 rows."""
LONGEST_PAUSE: Final = 64
"""Tokens for which nothing is guessed, at most, after guesses that were wrong."""


class PromptLookup:
    """Guesses how a text goes on, as far as guesses were right lately.

    Args:
        tokens: the text so far.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._length = FIRST
        self._pause = 0
        self._resumes = 0
        self.add(tokens)

    def add(self, tokens: Iterable[int]) -> None:
        """Continue the text."""
        for token in tokens:
            # An ending is known once something follows it: its last place is not the text's end.
            if len(self._tokens) >= ENDING:
                self._after[tuple(self._tokens[-ENDING:])] = len(self._tokens)
            self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """Up to ``most`` tokens that may be next; none where nothing speaks for any."""
        if len(self._tokens) < self._resumes:
            return []
        place = self._after.get(tuple(self._tokens[-ENDING:]))
        if place is None:
            return []
        # A text that repeats itself at its end is taken to go on so: guesses are followed, too.
        guesses: list[int] = []
        for at in range(place, place + min(self._length, most)):
            ahead = at - len(self._tokens)
            guesses.append(self._tokens[at] if ahead < 0 else guesses[ahead])
        return guesses

    def judge(self, drafted: int, right: int) -> None:
        """Guess more or fewer tokens from now on, as ``right`` of ``drafted`` were right."""
        if right == drafted:
            self._length = min(2 * self._length, MOST)
        elif right:
            self._length = max(right, FIRST)
        else:
            self._length = FIRST
        self._pause = 0 if right else min(max(2 * self._pause, 4), LONGEST_PAUSE)
        self._resumes = len(self._tokens) + self._pause


def most_likely_tokens(decoder: Decoder, prompt: Tensor, count: int) -> Iterator[int]:
    """The most likely continuation of a prompt, token by token, with guesses along the way.

    Args:
        decoder: which has seen no tokens.
        prompt: ``[n]`` int64 token ids.
        count: number of tokens.
    """
    lookup = PromptLookup(prompt.tolist())
    new = [most_likely(decoder.append(prompt))]
    made = 0
    while True:
        lookup.add(new)
        yield from new
        made += len(new)
        if made == count:
            return
        draft = lookup.draft(count - made - 1)
        new = _checked(decoder, new[-1], draft)
        if draft:
            lookup.judge(len(draft), len(new) - 1)


def _checked(decoder: Decoder, token: int, draft: list[int]) -> list[int]:
    """What the model writes after ``token``: those of ``draft`` that it would write, and one more.

    The decoder has then seen ``token`` and those of ``draft``.
    """
    begin = decoder.position
    tokens = torch.tensor([token, *draft], dtype=torch.int64, device="cpu")
    logits = decoder.step(tokens) if draft else decoder.append(tokens).unsqueeze(0)
    chosen = []
    for row, guess in zip(logits, [*draft, None], strict=True):
        chosen.append(most_likely(row))
        if chosen[-1] != guess:
            break
    decoder.truncate(begin + len(chosen))
    return chosen
