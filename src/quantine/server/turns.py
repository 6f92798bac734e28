"""Texts of several clients, continued in turns: a step of each, and again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from starlette.concurrency import run_in_threadpool
from torch import Tensor

from quantine.runtime.continuation import Continuation
from quantine.server.engine import Engine
from quantine.server.requests import Request

_Made = asyncio.Queue[tuple[list[int], bool] | Exception]
"""New tokens of a text and whether they are its last, or what went wrong."""


class Turns:
    """The places of an engine, and what is going on there.

    Args:
        engine: which nobody else uses.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._free: asyncio.Queue[int] = asyncio.Queue()  # which is fair: who came first is first
        for place in range(engine.places):
            self._free.put_nowait(place)
        self._texts: dict[Continuation, _Made] = {}
        self._rounds: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def place(self) -> AsyncIterator[int]:
        """A place for a text; whoever wants one waits until one is free."""
        place = await self._free.get()
        try:
            yield place
        finally:
            self._free.put_nowait(place)

    async def tokens(self, place: int, request: Request, ids: Tensor) -> AsyncGenerator[int]:
        """The tokens of the answer, without the one that ends it, as they are made.

        Args:
            place: one's own, see `place`.
            request: what is asked.
            ids: ``[1, n]`` int64, the prompt.
        """
        text = self._engine.text(place, request, ids)
        made: _Made = asyncio.Queue()
        self._texts[text] = made
        if self._rounds is None or self._rounds.done():
            self._rounds = asyncio.create_task(self._go_round())
        last = False
        try:
            while not last:
                found = await made.get()
                if isinstance(found, Exception):
                    raise found
                tokens, last = found
                for token in tokens:
                    yield token
        finally:
            self._texts.pop(text, None)  # which the next round leaves out

    async def _go_round(self) -> None:
        """Continue all texts until there are none.

        One new text begins in a round, so that others do not wait for several prompts.
        """
        while self._texts:
            new = [text for text in self._texts if not text.begun][:1]
            texts = [*(text for text in self._texts if text.begun), *new]
            try:
                made = await run_in_threadpool(self._engine.advance, texts)
            except Exception as error:  # each client is told
                for text in texts:
                    self._end(text, error)
                continue
            for text, tokens in zip(texts, made, strict=True):
                if isinstance(tokens, Exception):
                    self._end(text, tokens)
                elif text.ended:
                    self._end(text, (tokens, True))
                elif text in self._texts:
                    self._texts[text].put_nowait((tokens, False))

    def _end(self, text: Continuation, last: tuple[list[int], bool] | Exception) -> None:
        if text in self._texts:
            self._texts.pop(text).put_nowait(last)
