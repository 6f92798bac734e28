"""What one process saves, another loads with the same logits, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tiny_models import FAMILIES, LEVELS, bits_equal, logits_of, some_tokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

READER = """
import json, sys
import torch, transformers
import quantine
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
request = json.load(open(sys.argv[1]))
tokens = load_file(request["tokens"])["tokens"]
logits = {}
for directory in request["directories"]:
    for dtype in request["dtypes"]:
        model, _ = quantine.load(directory, getattr(torch, dtype))
        with torch.no_grad():
            logits[f"{directory} {dtype}"] = model(input_ids=tokens).logits.contiguous()
save_file(logits, request["answer"])
"""


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
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("elsewhere")
    save_file({"tokens": some_tokens()}, root / "tokens.safetensors")
    request = {
        "tokens": str(root / "tokens.safetensors"),
        "directories": [str(packed(name, "mixed")) for name in FAMILIES],
        "dtypes": list(DTYPES),
        "answer": str(root / "logits.safetensors"),
    }
    (root / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-c", READER, str(root / "request.json")]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return load_file(root / "logits.safetensors")


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
