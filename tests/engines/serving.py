"""What tests of real engines share: their interpreters, text, and quantine's own numbers."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import quantine
from quantine.calibrate.text import read_text
from quantine.source.locate import locate

PROGRAMS = Path(__file__).parent
GGUF_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "falcon_old": {},
    "bloom": {},
    "gpt2": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
}
"""Tiny models that GGUF files hold, one of each family, and what those files have no place for."""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def interpreter(variable: str) -> str:
    """The Python of an engine's environment, which ``make engines`` names in ``variable``."""
    path = os.environ.get(variable)
    if path is None:
        pytest.skip(f"{variable} names no Python with the engine: see `make engines`")
    return path


def run_engine(python: str, program: str, *arguments: str) -> Any:
    """The JSON that a program of this folder prints, between what the engine has to say."""
    done = subprocess.run(
        [python, str(PROGRAMS / program), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])


def windows_of(model: str | Path, length: int, count: int) -> list[list[int]]:
    """The first tokens of the held-out text."""
    tokenizer = locate(model).tokenizer()
    ids = tokenizer(read_text("builtin", "heldout"), add_special_tokens=False)["input_ids"]
    return [ids[start : start + length] for start in range(0, length * count, length)]


@torch.no_grad()
def own_perplexity(directory: Path, windows: list[list[int]]) -> float:
    """Perplexity of a quantized directory by exact products in float32."""
    model, _ = quantine.load(directory, "float32", arithmetic="exact")
    total, count = 0.0, 0
    for window in windows:
        ids = torch.tensor([window])
        predicted = model(ids).logits[0, :-1].double().log_softmax(-1)
        total -= float(predicted.gather(1, ids[0, 1:, None]).sum())
        count += len(window) - 1
    return math.exp(total / count)


@torch.no_grad()
def own_continuations(directory: Path, windows: list[list[int]]) -> list[list[int]]:
    """Greedy continuations of the first 16 tokens of each window by 16 tokens."""
    model, _ = quantine.load(directory, "float32", arithmetic="exact")
    begun = [torch.tensor([window[:16]]) for window in windows]
    options = {"max_new_tokens": 16, "do_sample": False}
    return [model.generate(ids, **options)[0, 16:].tolist() for ids in begun]
