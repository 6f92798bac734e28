"""What one process saves, another loads with the same logits, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from other_process import logits_elsewhere
from tiny_models import FAMILIES, LEVELS, bits_equal, logits_of, some_tokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def levels(directory: Path) -> set[tuple[int, bool]]:
    """Bits and symmetry of every layer in a directory."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    schemes = [config["schemes"][layer["scheme"]] for layer in config["layers"].values()]
    return {(scheme["bits"], scheme["sym"]) for scheme in schemes}


@pytest.fixture(scope="module")
def elsewhere(
    packed: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """Logits, by directory and dtype, of every family in a process of its own."""
    directories = [packed(name, "mixed") for name in FAMILIES]
    root = tmp_path_factory.mktemp("elsewhere")
    return logits_elsewhere(directories, some_tokens(), DTYPES, root)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_process_computes_the_same_bits(
    name: str,
    packed: Callable[[str, str], Path],
    elsewhere: dict[str, torch.Tensor],
) -> None:
    directory = packed(name, "mixed")
    assert levels(directory) == set(LEVELS)
    results = []
    for label, dtype in DTYPES.items():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        logits = logits_of(model)
        assert logits.dtype == dtype
        assert torch.isfinite(logits).all()
        assert bits_equal(elsewhere[f"{directory} {label}"], logits), label
        results.append(logits.float())
    # The dtypes really differ, so none of them was compared with itself by mistake.
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])
