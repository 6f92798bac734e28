"""The server, asked by the client that OpenAI publishes."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn

from quantine import PlanError, cli
from quantine.commands import serving
from quantine.runtime.continuation import Continuation
from quantine.runtime.generate import stream
from quantine.server.engine import Engine
from quantine.server.serve import listen, make_server, url_of
from tiny_models import CONTEXT

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('a system message is first') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
)
PROMPT = "Line 1: 2 apples"
MESSAGES = [{"role": "user", "content": "Line 1: 2 apples"}]
TOKENS = 24
ASKED: dict[str, Any] = {
    "model": "served",
    "prompt": PROMPT,
    "max_tokens": TOKENS,
    "temperature": 0,
}


@dataclass(frozen=True)
class Served:
    """A directory, and a client of the server that has it."""

    directory: Path
    client: openai.OpenAI
    engine: Engine

    def text(self, **options: Any) -> str:
        done = self.client.completions.create(**{**ASKED, **options})
        return str(done.choices[0].text)


@pytest.fixture(scope="module")
def served(
    packed: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("serve") / "served"
    shutil.copytree(packed("llama", "gptq"), directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    engine = Engine(directory, None, torch.float32, "cpu", io.StringIO())
    with listen("127.0.0.1", 0) as listener:
        server = make_server(engine)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        with openai.OpenAI(base_url=url_of(listener), api_key="-", max_retries=0) as client:
            yield Served(directory, client, engine)
        server.should_exit = True
        thread.join()


def own_text(directory: Path, prompt: str, chat: bool, **options: Any) -> str:
    """What `quantine generate` writes."""
    out = io.StringIO()
    stream(
        directory,
        [prompt],
        chat=chat,
        dtype=torch.float32,
        out=out,
        log=io.StringIO(),
        **{"tokens": TOKENS, "temperature": 0.0, "seed": 0, **options},
    )
    return out.getvalue().removesuffix("\n")


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.3, "seed": 7}])
def test_texts_are_those_of_generate_whole_and_in_pieces(
    sampling: dict[str, Any], served: Served
) -> None:
    wanted = own_text(served.directory, PROMPT, chat=False, **sampling)
    assert len(wanted) > 5
    asked = {**ASKED, **sampling}
    whole = served.client.completions.create(**asked)
    assert whole.choices[0].text == wanted
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == 1 + len(PROMPT)
    assert whole.usage.completion_tokens == TOKENS
    pieces = list(
        served.client.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    *texts, last = pieces
    assert "".join(piece.choices[0].text for piece in texts) == wanted
    assert [piece.choices[0].finish_reason for piece in texts] == [None] * (len(texts) - 1) + [
        "length"
    ]
    assert last.usage == whole.usage
    assert len(pieces) > 5
    assert served.text(prompt=served.engine.tokenizer(PROMPT)["input_ids"], **sampling) == wanted


def test_conversations_go_through_the_chat_template(served: Served) -> None:
    wanted = own_text(served.directory, PROMPT, chat=True)
    asked: dict[str, Any] = {"model": "served", "max_tokens": TOKENS, "temperature": 0}
    whole = served.client.chat.completions.create(messages=MESSAGES, **asked)
    assert whole.choices[0].message.content == wanted
    parts = [{"type": "text", "text": PROMPT[:3]}, {"type": "text", "text": PROMPT[3:]}]
    pieces = list(
        served.client.chat.completions.create(
            messages=[{"role": "user", "content": parts}], stream=True, **asked
        )
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted
    assert pieces[-1].choices[0].finish_reason == "length"


def test_an_answer_ends_before_a_stop_string(served: Served) -> None:
    text = served.text()
    for stop in (text[4:7], [text[6:9], "never there", text[4:6]]):
        stops = [stop] if isinstance(stop, str) else stop
        first = min(text.index(one) for one in stops if one in text)
        done = served.client.completions.create(**ASKED, stop=stop)
        assert done.choices[0].text == text[:first]
        assert done.choices[0].finish_reason == "stop"
        pieces = served.client.completions.create(**ASKED, stop=stop, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == text[:first]
    # What may begin a stop string is shown once it is none.
    assert served.text(stop=text[-1] + "never there") == text


def test_clients_have_turns(served: Served) -> None:
    prompts = [f"Line {n}: " for n in range(4)]
    alone = [served.text(prompt=prompt) for prompt in prompts]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda prompt: served.text(prompt=prompt), prompts)) == alone


@contextmanager
def slowly(engine: Engine) -> Iterator[list[int]]:
    """A context in which ``engine`` takes its time, and the tokens that it makes there."""
    made: list[int] = []
    advance = engine.advance

    def slow(texts: Sequence[Continuation]) -> list[list[int]]:
        time.sleep(0.02)
        found = advance(texts)
        made.extend(token for tokens in found for token in tokens)
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "advance", slow)
        yield made


@pytest.mark.parametrize("sampled", [True, False])
def test_clients_that_stream_at_once_get_their_tokens_by_turns(
    sampled: bool, served: Served
) -> None:
    asked = [
        {**ASKED, "prompt": f"Line {n}: ", "temperature": 1.3 * sampled, "seed": n}
        for n in range(3)
    ]
    alone = [served.text(**options) for options in asked]
    arrived: list[int] = []

    def streamed(client: int) -> str:
        text = ""
        for piece in served.client.completions.create(**asked[client], stream=True):
            arrived.append(client)
            text += piece.choices[0].text
        return text

    with slowly(served.engine), ThreadPoolExecutor(3) as pool:
        assert list(pool.map(streamed, range(3))) == alone
    # None had all its tokens before another had any.
    firsts = [arrived.index(client) for client in range(3)]
    lasts = [len(arrived) - 1 - arrived[::-1].index(client) for client in range(3)]
    assert max(firsts) < min(lasts)
    changes = sum(a != b for a, b in itertools.pairwise(arrived))
    assert changes > len(arrived) / 4


def test_an_answer_that_fails_is_said_to_all_and_the_next_is_made(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Sequence[Continuation]) -> list[list[int]]:
        raise RuntimeError("no memory")

    with monkeypatch.context() as broken:
        broken.setattr(served.engine, "advance", fail)
        with pytest.raises(openai.InternalServerError, match="the server failed"):
            served.text()
    # The framework closes the connection; the client then opens another.
    again = served.client.with_options(max_retries=2)
    assert again.completions.create(**ASKED).choices[0].text


def test_what_goes_wrong_with_one_text_ends_no_other(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Continuation.take

    def fail_once(self: Continuation, logits: torch.Tensor) -> list[int]:
        if self._sampler._sampling.seed == 13:
            raise RuntimeError("no memory")
        return take(self, logits)

    with monkeypatch.context() as broken, ThreadPoolExecutor(3) as clients:
        broken.setattr(Continuation, "take", fail_once)
        good = [clients.submit(served.text, seed=seed) for seed in (1, 2)]
        with pytest.raises(openai.InternalServerError, match="the server failed"):
            served.text(seed=13)
        assert good[0].result() == good[1].result() == served.text()


def test_other_clients_are_answered_while_a_long_text_is_cut_into_tokens(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, answered = threading.Event(), threading.Event()
    prompt_ids = served.engine.prompt_ids

    def slow(request: Any) -> torch.Tensor:
        waiting.set()
        assert answered.wait(60)
        return prompt_ids(request)

    with ThreadPoolExecutor(1) as clients:
        monkeypatch.setattr(served.engine, "prompt_ids", slow)
        long = clients.submit(served.text)
        assert waiting.wait(60)
        assert served.client.models.list().data
        answered.set()
        assert long.result()


def test_where_nobody_says_how_many_tokens_there_are_as_many_as_fit(served: Served) -> None:
    def tokens(length: int) -> int:
        asked = {"model": "served", "prompt": "x" * length, "temperature": 0}
        usage = served.client.completions.create(**asked).usage
        assert usage is not None
        return int(usage.completion_tokens)

    assert tokens(CONTEXT - 3) <= 3
    assert tokens(8) <= 16


@dataclass(frozen=True)
class OnePlace:
    """A server that makes one answer at a time, its client, and the tokens that it made."""

    server: uvicorn.Server
    client: openai.OpenAI
    made: list[int]


@contextmanager
def one_place(served: Served) -> Iterator[OnePlace]:
    """The client of a server that makes one answer at a time, slowly."""
    engine = Engine(served.directory, None, torch.float32, "cpu", io.StringIO(), places=1)
    with listen("127.0.0.1", 0) as listener:
        server = make_server(engine)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        with (
            slowly(engine) as made,
            openai.OpenAI(base_url=url_of(listener), api_key="-", max_retries=0) as client,
        ):
            yield OnePlace(server, client, made)
        server.should_exit = True
        thread.join()


def test_a_client_that_goes_away_gives_its_place_to_the_next(served: Served) -> None:
    with one_place(served) as one:
        pieces = one.client.completions.create(**{**ASKED, "max_tokens": 100}, stream=True)
        next(iter(pieces))
        # The second waits for a place, and is gone before it has one.
        with pytest.raises(openai.APITimeoutError):
            one.client.with_options(timeout=0.1).completions.create(**ASKED)
        pieces.close()
        third = one.client.completions.create(**{**ASKED, "max_tokens": 3})
    assert third.choices[0].text
    assert len(one.made) < TOKENS


REFUSED: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "model": ({"model": "other"}, "no model 'other' here, only 'served'", "model"),
    "n": ({"n": 2}, "n cannot be 2 here", "n"),
    "logprobs": ({"logprobs": 0}, "logprobs cannot be 0 here", "logprobs"),
    "echo": ({"echo": True}, "echo cannot be True", "echo"),
    "penalty": ({"frequency_penalty": 0.5}, "frequency_penalty cannot be 0.5", "frequency_penalty"),
    "unknown": ({"extra_body": {"top_k": 5}}, "top_k is not known here", "top_k"),
    "cold": ({"temperature": -1}, "temperature must be a number from 0 to 2", "temperature"),
    "text": ({"temperature": "hot"}, "temperature must be a number", "temperature"),
    "top_p": ({"top_p": 1.5}, "top_p must be a number from 0 to 1", "top_p"),
    "seed": ({"seed": 0.5}, "seed must be a whole number", "seed"),
    "none": ({"max_tokens": 0}, "max_tokens must be a whole number from 1", "max_tokens"),
    "stop": ({"stop": ["a", ""]}, "stop must be a string, or at most 16", "stop"),
    "two": ({"prompt": ["a", "b"]}, "prompt must be one text", "prompt"),
    "empty": ({"prompt": ""}, "prompt is empty", "prompt"),
    "ids": ({"prompt": [5, 10**30]}, "token ids must be below 300", "prompt"),
    "stream": ({"stream_options": {"include_usage": True}}, "add stream", "stream_options"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_by_name(name: str, served: Served) -> None:
    changes, message, param = REFUSED[name]
    with pytest.raises(openai.APIStatusError) as refused:
        served.text(**changes)
    error = refused.value.body
    assert isinstance(error, dict)
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert refused.value.status_code == (404 if name == "model" else 400)


def test_a_prompt_that_leaves_no_room_is_refused(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match=f"exceed the context of {CONTEXT}") as refused:
        served.text(prompt="x" * (CONTEXT - TOKENS))
    assert refused.value.code == "context_length_exceeded"
    fits = served.client.completions.create(**{**ASKED, "prompt": "x" * (CONTEXT - TOKENS - 1)})
    assert fits.usage is not None
    assert fits.usage.total_tokens <= CONTEXT


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of messages"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\] must have one of the roles"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "must have content that is text"),
        ([{"role": "user", "content": "x", "name": "me"}], r"messages\[0\] has 'name'"),
        ([*MESSAGES, {"role": "system", "content": "x"}], "a system message is first"),
    ],
)
def test_messages_are_checked(messages: Any, message: str, served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        served.client.chat.completions.create(model="served", messages=messages)


def test_what_clients_send_without_need_is_taken(served: Served) -> None:
    nothing = {"n": 1, "presence_penalty": 0.0, "logprobs": None, "user": "me", "stop": []}
    assert served.text(**nothing) == served.text()
    tools: dict[str, Any] = {"tools": [], "logprobs": False, "max_completion_tokens": 2}
    done = served.client.chat.completions.create(model="served", messages=MESSAGES, **tools)
    assert done.usage is not None
    assert done.usage.completion_tokens == 2


def test_routes(served: Served) -> None:
    client = served.client
    assert [model.id for model in client.models.list()] == ["served"]
    assert client.models.retrieve("served").id == "served"
    with pytest.raises(openai.NotFoundError, match="no model 'a/b'"):
        client.models.retrieve("a/b")
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings is not served here"):
        client.embeddings.create(model="served", input="x")
    with pytest.raises(openai.BadRequestError, match="no JSON"):
        client.post("/completions", content=b"{", cast_to=object)
    with pytest.raises(openai.BadRequestError, match="must be a JSON object"):
        client.post("/completions", content=b"[]", cast_to=object)
    half = json.dumps({**ASKED, "prompt": "\ud800"}).encode()
    with pytest.raises(openai.BadRequestError, match="half of a surrogate pair"):
        client.post("/completions", content=half, cast_to=object)
    half = json.dumps({**ASKED, "\ud800": 1}).encode()
    with pytest.raises(openai.BadRequestError, match="is not known here"):
        client.post("/completions", content=half, cast_to=object)


def test_of_the_smallest_share_one_token_is_left(served: Served) -> None:
    assert served.text(temperature=1.0, top_p=1e-300) == served.text(temperature=0.0)


def test_a_client_may_leave_within_its_request(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    url = served.client.base_url
    with socket.create_connection((url.host, url.port)) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n{"
        connection.sendall(head.encode())
    assert served.text()
    assert "Exception" not in caplog.text


def test_a_program_serves_until_it_is_interrupted(served: Served) -> None:
    command = [sys.executable, "-m", "quantine.cli", "serve", str(served.directory), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        said = program.stdout.readline()
        assert said.startswith("served at http://127.0.0.1:")
        with openai.OpenAI(base_url=said.split()[2].rstrip(","), api_key="-") as client:
            assert client.completions.create(**ASKED).choices[0].text == served.text()
        program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=120)  # a busy machine takes 20 s to end Python
    assert (program.returncode, out, err) == (
        0,
        "ended\n",
        "",
    )  # decoded natively, else err says so


def test_who_waits_when_it_ends_is_told(served: Served) -> None:
    with one_place(served) as one, ThreadPoolExecutor(1) as pool:
        create = one.client.completions.create
        pieces = iter(create(**{**ASKED, "max_tokens": 100}, stream=True))
        next(pieces)
        waiting = pool.submit(create, **ASKED)
        time.sleep(0.1)
        one.server.should_exit = True
        with pytest.raises(openai.APIError, match="the server is ending"):
            list(pieces)
        with pytest.raises(openai.InternalServerError, match="the server is ending"):
            waiting.result()


def test_a_missing_framework_is_named(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    assert cli.main(["serve", str(served.directory)]) == cli.EXIT_REFUSED
    assert capsys.readouterr().err == (
        "quantine: serve needs starlette and uvicorn: pip install 'quantine[serve]'\n"
    )


def test_a_port_is_refused_where_it_is_taken_and_a_context_where_it_is_too_long(
    served: Served,
) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PlanError, match=f"cannot listen at 127.0.0.1, port {port}"):
            listen("127.0.0.1", port)
    with pytest.raises(PlanError, match=f"at most {CONTEXT}, the model's own, not 129"):
        Engine(served.directory, CONTEXT + 1, torch.float32, "cpu", io.StringIO())
