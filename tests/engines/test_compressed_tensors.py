"""Exported directories in the library compressed-tensors: all widths, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engines.serving import interpreter, run_engine
from quantine import Calibration, Plan, quantize
from quantine.formats.export import export
from quantine.formats.finished import FinishedDirectory
from tiny_models import build, tiny_config

pytestmark = [pytest.mark.engines, pytest.mark.slow]


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_library_reads_the_same_weights(bits: int, sym: bool, tmp_path: Path) -> None:
    python = interpreter("QUANTINE_COMPRESSED_TENSORS_PYTHON")
    model = build(tiny_config("llama"), tmp_path / "model")
    plan = Plan.preset("rtn", bits=bits, group_size=32, sym=sym)
    out = quantize(model, tmp_path / "out", plan, Calibration(samples=0)).path
    written = export(out, tmp_path / "ct", "compressed-tensors").path
    file = tmp_path / "found.safetensors"
    assert run_engine(python, "compressed_tensors_program.py", str(written), str(file))["layers"]
    found, finished = load_file(file), FinishedDirectory(out)
    assert found.keys() == finished.description.layers.keys()
    for name, weight in found.items():
        # The library computes weights in the dtype of the scales.
        assert torch.equal(weight, finished.qtensor(name).dequantize().half())
