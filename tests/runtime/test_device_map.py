"""Models that a device map spreads: over memory and disk, and by the bytes that they take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.accelerate import compute_module_sizes, infer_auto_device_map

from quantine.core.device import CPU
from quantine.runtime.device_map import computes_on_cpu
from quantine.runtime.packed import packed_modules
from tiny_models import some_tokens

Packed = Callable[[str, str], Path]
IDS = some_tokens(6, 1)


def opened(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)


def generated(model: Any) -> list[int]:
    made: list[int] = model.generate(IDS, max_new_tokens=6, do_sample=False)[0].tolist()
    return made


def test_a_map_counts_packed_bytes(packed: Packed) -> None:
    model = opened(packed("llama", "gptq"))
    sizes, _ = compute_module_sizes(model, model.hf_quantizer)
    for name, module in packed_modules(model):
        assert sizes[name] == sum(t.nbytes for t in module.packed_tensors().values())
        assert sizes[name] < module.out_features * module.in_features // 2
    block = sizes["model.layers.0"]
    # Room for the embedding and one block, beside the largest layer that may come and go.
    largest = max(sizes["model.embed_tokens"], sizes["lm_head"])
    room = {0: sizes["model.embed_tokens"] + block + largest, "cpu": 2**30}
    found = infer_auto_device_map(
        model, room, model._no_split_modules, hf_quantizer=model.hf_quantizer
    )
    assert found["model.embed_tokens"] == found["model.layers.0"] == 0
    assert found["model.layers.1"] == found["lm_head"] == "cpu"


def test_modules_left_on_the_cpu_compute_there() -> None:
    asked = {"a": 0, "b": "cpu", "c": "disk"}
    assert computes_on_cpu(asked) == {"a": 0, "b": CPU, "c": "disk"}
    assert asked["b"] == "cpu"
    alone = {"a": "cpu", "b": "disk"}
    assert computes_on_cpu(alone) == alone


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_blocks_on_disk_are_read_when_they_are_used(name: str, packed: Packed) -> None:
    expected = generated(opened(packed(name, "gptq")))
    sizes, leaves = compute_module_sizes(opened(packed(name, "gptq")))
    # Beside room for the largest layer, this is the embedding and a half of the blocks.
    room = sizes[""] - sizes["lm_head"] - sizes[next(n for n in sizes if n.endswith("layers.1"))]
    model = opened(
        packed(name, "gptq"),
        device_map="auto",
        max_memory={"cpu": room + max(leaves.values())},
        offload_buffers=True,
    )
    assert "disk" in model.hf_device_map.values()
    away = [module for _, module in packed_modules(model) if module.codes.is_meta]
    assert away
    assert generated(model) == expected
    for module in away:
        assert module.codes.is_meta
        assert module._matrix is None, "what was read for a call is still in memory"


def test_what_fits_is_not_spread(packed: Packed) -> None:
    model = opened(packed("llama", "gptq"), device_map="auto", max_memory={"cpu": 2**30})
    assert generated(model) == generated(opened(packed("llama", "gptq")))
    assert all(module._matrix is not None for _, module in packed_modules(model))
