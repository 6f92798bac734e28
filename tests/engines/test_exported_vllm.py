"""Exported GPTQ and compressed-tensors directories in the real vLLM, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engines.serving import interpreter, own_continuations, own_perplexity, run_engine, windows_of
from quantine import Calibration, Plan, quantize
from quantine.formats.export import export

pytestmark = [
    pytest.mark.engines,
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
        reason="vLLM has its product with 4 bit weights for processors with AVX-512 only",
    ),
]
CLOSE = 0.005
"""Largest relative difference of perplexities: vLLM's kernels compute in 16 bits."""


@pytest.mark.parametrize(
    ("to", "sym"),
    [("gptq", True), ("compressed-tensors", True), ("compressed-tensors", False)],
)
def test_the_same_perplexity_and_tokens(to: str, sym: bool, tmp_path: Path) -> None:
    python = interpreter("QUANTINE_VLLM_PYTHON")
    plan = Plan.preset("rtn", bits=4, group_size=64, sym=sym, clip="mse")
    out = quantize("demo", tmp_path / "out", plan, Calibration(samples=0)).path
    served = export(out, tmp_path / "served", to, engine="vllm").path
    windows = windows_of(out, 128, 8)
    asked = tmp_path / "windows.json"
    asked.write_text(json.dumps(windows), encoding="utf-8")
    found = run_engine(python, "vllm_program.py", str(served), str(asked), "float16")
    expected = own_perplexity(out, windows)
    assert found["perplexity"] == pytest.approx(expected, rel=CLOSE)
    own = own_continuations(out, windows)
    same = sum(one == two for one, two in zip(found["tokens"], own, strict=True))
    assert same >= len(own) - 1  # 16 bits may decide between two words that are as likely
