"""The packed cache whose memory never moves, against the one that grows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_graph_decoder import decoded, replayed

import quantine
from quantine import Calibration, Plan, quantize
from quantine.runtime.generate import ModuleDecoder
from quantine.runtime.graph_decoder import StaticDecoder
from quantine.runtime.kv_cache import BLOCK
from tiny_models import some_tokens

SCHEMES = ("W4A8", "W4A4KV", "W3A3KV", "W16A8KV")


@pytest.fixture(scope="module")
def rounding(
    tiny: Callable[[str], Path], short: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    pytest.importorskip("sklearn")
    root = tmp_path_factory.mktemp("static")

    def loaded(scheme: str) -> Any:
        out = root / scheme
        if not out.exists():
            quantize(tiny("llama"), out, Plan.scheme(scheme, arithmetic="exact"), short)
        return quantine.load(out, torch.float32)[0]

    return loaded


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_repeated_step_computes_what_the_modules_do(
    scheme: str, rounding: Callable[[str], Any]
) -> None:
    model = rounding(scheme)
    decoder, usual = StaticDecoder(model, BLOCK + 9, replayed), ModuleDecoder(model)
    for prompt in (some_tokens(BLOCK + 4, 1)[0], some_tokens(1, 1)[0]):
        pairs = zip(decoded(decoder, prompt, 6), decoded(usual, prompt, 6), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
