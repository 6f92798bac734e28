"""Models of which one part is on a device that refuses tensors of the CPU, and one on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from other_device import NAME, OtherDevice
from quantine import Calibration, Plan, quantize
from quantine.runtime.packed import packed_modules
from tiny_models import some_tokens

Tiny = Callable[[str], Path]
Packed = Callable[[str, str], Path]
PARTS = {
    "llama": ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"),
    "opt": (
        "model.decoder.embed_tokens",
        "model.decoder.embed_positions",
        "model.decoder.final_layer_norm",
        "lm_head",
    ),
}
BLOCKS = {"llama": "model.layers", "opt": "model.decoder.layers"}


def opened(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)


def generated(model: Any) -> list[int]:
    ids = some_tokens(6, 1).to(model.device)
    made: list[int] = model.generate(ids, max_new_tokens=6, do_sample=False)[0].tolist()
    return made


def spread(name: str, first: str) -> dict[str, str]:
    """All but the blocks after the first on the other device; ``first`` is where that one is."""
    found = dict.fromkeys(PARTS[name], NAME)
    blocks = {f"{BLOCKS[name]}.{n}": "cpu" for n in range(1, 3 if name == "opt" else 2)}
    return found | {f"{BLOCKS[name]}.0": first} | blocks


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("first", [NAME, "cpu"])
def test_blocks_left_on_the_cpu_run_there_natively(
    name: str, first: str, packed: Packed, caplog: pytest.LogCaptureFixture
) -> None:
    expected = generated(opened(packed(name, "rtn")))
    asked = spread(name, first)
    with OtherDevice(), caplog.at_level(logging.WARNING, "quantine"):
        model = opened(packed(name, "rtn"), device_map=asked)
        assert generated(model) == expected
    assert "cpu" in asked.values(), "the caller's own map was changed"
    assert "spread the modules" in caplog.text
    for path, module in packed_modules(model):
        here = any(path.startswith(f"{part}.") for part, at in asked.items() if at == "cpu")
        assert module.codes.device.type == ("cpu" if here else NAME)
        assert (module._matrix is not None) == here


def test_a_head_may_be_away_from_the_table_that_it_shares(tiny: Tiny, tmp_path: Path) -> None:
    rules = [
        {"match": match, "method": "rtn", "bits": 8, "group_size": 32}
        for match in ("@blocks", "@embedding")
    ]
    quantize(
        tiny("llama_tied"),
        tmp_path / "out",
        Plan.from_dict({"rules": rules}),
        Calibration(samples=0),
    )
    expected = generated(opened(tmp_path / "out"))
    with OtherDevice():
        model = opened(tmp_path / "out", device_map=spread("llama", NAME) | {"lm_head": "cpu"})
        assert generated(model) == expected


def test_a_spread_model_is_saved_whole(packed: Packed, tmp_path: Path) -> None:
    with OtherDevice():
        model = opened(packed("llama", "rtn"), device_map=spread("llama", NAME))
        model.save_pretrained(tmp_path / "copy")
    assert generated(opened(tmp_path / "copy")) == generated(opened(packed("llama", "rtn")))
