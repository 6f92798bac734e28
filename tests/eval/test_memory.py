"""The size of a key-value cache against the cache that transformers makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantine.eval.memory import ELEMENT_BYTES, cache_bytes
from quantine.source.locate import locate
from tiny_models import some_tokens

NAMES = ("llama", "qwen3", "opt", "gpt2", "bloom", "phi3", "falcon_alibi")


@pytest.mark.parametrize("name", [*NAMES, "falcon_old", "falcon_new"])
def test_a_cache_takes_what_is_predicted(name: str, tiny: Callable[[str], Path]) -> None:
    source = locate(tiny(name))
    model = source.float_model(torch.float32)
    with torch.no_grad():
        cache = model(input_ids=some_tokens(20, batch=1), use_cache=True).past_key_values
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cache_bytes(source.config(), 20) == elements * ELEMENT_BYTES
