"""A model whose matrices differ in size, but which computes the same, is quantized alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantine
from quantine import Calibration, Plan, quantize
from quantine.formats.finished import FinishedDirectory
from tiny_models import byte_tokenizer

Tiny = Callable[[str], Path]
TOKENS = torch.tensor([byte_tokenizer()("Line 33: 22 apples and 10 pears.\nLine 34").input_ids])
POWER = 16
SMALL = ("v_proj", "up_proj")
LARGE = ("o_proj", "down_proj")
"""These take back what their inputs lack."""
PLANS = {
    "rtn": lambda: Plan.preset("rtn", bits=8, group_size=-1),
    "gptq": lambda: Plan.preset("gptq", bits=4, group_size=32),
    "spqr": lambda: Plan.preset("spqr"),
    "budget": lambda: Plan.budget(4.5),
    "W4A8": lambda: Plan.scheme("W4A8"),
    "W4A8-token": lambda: Plan.scheme("W4A8-token"),
    "W4A4-tensor": lambda: Plan.scheme("W4A4-tensor"),
}


@pytest.fixture(scope="module")
def uneven(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama with values and hidden channels of the MLP divided by ``2**POWER``."""
    source, target = tiny("llama"), tmp_path_factory.mktemp("uneven")
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        kind = name.split(".")[-2]
        power = -POWER if kind in SMALL else POWER if kind in LARGE else 0
        tensors[name] = tensor.float() * 2.0**power
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@torch.no_grad()
def logits_of(directory: Path) -> Tensor:
    model, _ = quantine.load(directory)
    found: Tensor = model(input_ids=TOKENS).logits
    return found


@pytest.mark.parametrize("name", PLANS)
def test_logits_do_not_depend_on_the_size_of_weights(
    name: str, tiny: Tiny, uneven: Path, short: Calibration, tmp_path: Path
) -> None:
    usual, small = tmp_path / "usual", tmp_path / "small"
    quantize(tiny("llama"), usual, PLANS[name](), short)
    quantize(uneven, small, PLANS[name](), short)
    expected, found = logits_of(usual), logits_of(small)
    # Sums of squares round differently where ranges are searched, or bits are shared; and a last
    # digit decides which of two equally good clusters a channel joins.
    close = {"spqr": 0.02, "budget": 0.02, "W4A8": 0.05}.get(name, 2e-3)
    assert float((found - expected).norm() / expected.norm()) < close
    stored = FinishedDirectory(small)
    exponents = {n for n in stored.description.layers if "exponent" in stored.tensors(n)}
    assert {n.split(".")[-1] for n in exponents} >= set(SMALL)


def test_kept_matrices_are_not_lost(
    uneven: Path, tiny: Tiny, short: Calibration, tmp_path: Path
) -> None:
    rules = [{"match": "*.q_proj", "method": "rtn", "bits": 8}, {"match": "*", "method": "keep"}]
    plan = Plan.from_dict({"rules": rules})
    for name, source in (("usual", tiny("llama")), ("small", uneven)):
        quantize(source, tmp_path / name, plan, short)
    expected, found = logits_of(tmp_path / "usual"), logits_of(tmp_path / "small")
    assert float((found - expected).norm() / expected.norm()) < 1e-3
    kept = FinishedDirectory(tmp_path / "small").kept
    assert kept["model.layers.0.self_attn.v_proj.weight"].dtype == "F32"
    assert kept["model.layers.0.self_attn.k_proj.weight"].dtype == "F16"
