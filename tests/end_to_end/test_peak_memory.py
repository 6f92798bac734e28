"""Peak memory: a few blocks and the activations, however deep the model is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import build, tiny_config

WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
}
BLOCK_BYTES = 4 * (4 * 512 * 512 + 3 * 512 * 1536)

MEASURE = """
import json, resource, sys
import torch, transformers
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
from quantine import Calibration, Plan, quantize
from quantine.estimate import estimate
from quantine.prepare import prepare

model, out, text = sys.argv[1:]
# The matrices that take the most memory to solve are solved, the others only rounded.
solved = {"match": "*.down_proj", "method": "gptq", "group_size": 64}
rounded = {"match": "@blocks", "method": "rtn", "group_size": 64}
plan, calibration = Plan.from_dict({"rules": [solved, rounded]}), Calibration(text, 16, 64)
size = estimate(prepare(model, plan, calibration))
quantize(model, out, plan, calibration)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peak *= 1 if sys.platform == "darwin" else 1024
print(json.dumps({"peak": peak, "predicted": size.peak_memory, "held": size.activations}))
"""


def measure(blocks: int, text: Path, root: Path) -> dict[str, int]:
    """Bytes that quantizing a model of so many blocks takes at most, and what was predicted."""
    model = build(tiny_config("llama", **WIDE, num_hidden_layers=blocks), root / f"model-{blocks}")
    program = [sys.executable, "-c", MEASURE, str(model), str(root / f"out-{blocks}"), str(text)]
    # A process counts the peak of the one that started it as its own, so a small one starts it.
    command = ["sh", "-c", '"$@"; exit $?', "sh", *program]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_depth_costs_no_memory_and_the_plan_knows_it(text_file: Path, tmp_path: Path) -> None:
    shallow, deep = (measure(blocks, text_file, tmp_path) for blocks in (6, 24))
    assert shallow["held"] == deep["held"] == 16 * 64 * 512 * 4
    assert deep["peak"] <= 1.15 * shallow["peak"]
    # The interpreter and its libraries take most of both peaks. Beyond them, 18 more blocks may
    # not even cost the memory of three.
    assert deep["peak"] - shallow["peak"] < 3 * BLOCK_BYTES
    for run in (shallow, deep):
        assert 0.8 * run["peak"] <= run["predicted"] <= 1.2 * run["peak"]
