"""The routes of the server, behind which the texts of clients take turns."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send
from torch import Tensor

from quantine.runtime.prompt import Transcript
from quantine.server.answers import DONE, Answer, Finish, Piece, event
from quantine.server.engine import Engine
from quantine.server.refusal import Refusal, error_body
from quantine.server.requests import Request, check_served, read_request
from quantine.server.stops import StopFilter
from quantine.server.turns import Turns

MOST_BYTES: Final = 2**24
"""Bytes of a request at most."""
GONE: Final = 499
"""Status of what nobody reads, as servers log it."""


def make_app(engine: Engine, is_ending: Callable[[], bool]) -> Starlette:
    """A server of ``engine``, as an application of ASGI.

    Args:
        engine: which nobody else uses.
        is_ending: whether the server was told to end, so that no answer goes on.
    """
    api = _Api(engine, is_ending)
    return Starlette(
        routes=[
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/completions", api.completion, methods=["POST"]),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
        ],
        exception_handlers={
            Refusal: _refuse,
            HTTPException: _refuse_route,
            ClientDisconnect: _leave,
            Exception: _fail,  # whose traceback the server logs
        },
    )


class _Api:
    """What the routes do."""

    def __init__(self, engine: Engine, is_ending: Callable[[], bool]) -> None:
        self._engine = engine
        self._is_ending = is_ending
        self._turns = Turns(engine)

    async def models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def model(self, http: HttpRequest) -> Response:
        check_served(http.path_params["name"], self._engine.name)
        return JSONResponse(self._description())

    async def completion(self, http: HttpRequest) -> Response:
        return await self._answer(http, chat=False)

    async def chat(self, http: HttpRequest) -> Response:
        return await self._answer(http, chat=True)

    def _description(self) -> dict[str, Any]:
        return {
            "id": self._engine.name,
            "object": "model",
            "created": 0,
            "owned_by": "quantine",
            "max_model_len": self._engine.context,
        }

    async def _answer(self, http: HttpRequest, chat: bool) -> Response:
        body = await _content(http)
        request = read_request(body, chat, self._engine.name, self._engine.context)
        # A long text takes seconds, in which other clients are to be served.
        ids = await run_in_threadpool(self._engine.prompt_ids, request)
        answer = Answer(self._engine.name, chat, ids.shape[1])
        pieces = self._pieces(http, request, ids)
        if request.stream:
            return _EventStream(_events(answer, pieces, request.usage))
        async with aclosing(pieces):
            made = [piece async for piece in pieces]
        if not made or made[-1].finish is None:
            return Response(status_code=GONE)
        return JSONResponse(answer.whole("".join(piece.text for piece in made), made[-1]))

    async def _pieces(
        self, http: HttpRequest, request: Request, ids: Tensor
    ) -> AsyncGenerator[Piece]:
        """The answer, once there is a place for it; without an end if the client goes away.

        Raises:
            Refusal: the server is told to end.
        """
        most = self._engine.most(request, ids)
        transcript = Transcript(self._engine.tokenizer, ids[0].tolist())
        stops = StopFilter(request.stops)
        async with self._turns.place() as place:
            if await self._is_over(http):
                return
            async with aclosing(self._turns.tokens(place, request, ids)) as tokens:
                async for token in tokens:
                    text = stops.add(transcript.add(token))
                    if stops.stopped:
                        break
                    yield Piece(text, len(transcript), None)
                    if await self._is_over(http):
                        return
        if not stops.stopped:
            text = stops.add(transcript.rest())
        if stops.stopped:
            yield Piece(text, len(transcript), "stop")
        else:
            text += stops.rest()
            yield Piece(text, len(transcript), _finish(len(transcript), most))

    async def _is_over(self, http: HttpRequest) -> bool:
        """Whether nobody waits for the answer any more.

        Raises:
            Refusal: the server is told to end.
        """
        if self._is_ending():
            raise Refusal("the server is ending", status=503)
        return await http.is_disconnected()


def _finish(tokens: int, most: int) -> Finish:
    return "length" if tokens == most else "stop"


async def _content(http: HttpRequest) -> Any:
    """What the JSON text of a request holds."""
    text = bytearray()
    async for part in http.stream():
        text += part
        if len(text) > MOST_BYTES:
            raise Refusal(f"a request has at most {MOST_BYTES} bytes", status=413)
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the request is no JSON in UTF-8: {error}") from error


async def _events(
    answer: Answer, pieces: AsyncGenerator[Piece], usage: bool
) -> AsyncGenerator[str]:
    """The answer as events."""
    tokens = 0
    try:
        async with aclosing(pieces):
            yield answer.opening()
            async for piece in pieces:
                tokens = piece.tokens
                yield answer.piece(piece)
    except Refusal as error:
        yield event(error.body())
        return
    if usage:
        yield answer.count(tokens)
    yield DONE


class _EventStream(StreamingResponse):
    """Events that end at once when the client goes away."""

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        events: Any = self.body_iterator
        async with aclosing(events):  # so that its turn ends, too
            await super().stream_response(send)


async def _refuse(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error.body(), error.status)


async def _refuse_route(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path} is not served here: see /v1/models"
    body = error_body(message, "invalid_request_error")
    return JSONResponse(body, error.status_code, error.headers)


async def _leave(_: HttpRequest, error: Exception) -> Response:
    return Response(status_code=GONE)  # which nobody reads


async def _fail(_: HttpRequest, error: Exception) -> Response:
    body = error_body(f"the server failed ({type(error).__name__}): see its log", "server_error")
    return JSONResponse(body, 500)
