"""The example for vLLM; `make engines` runs this."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engines
pytest.importorskip("vllm")

from directories import Directories  # noqa: E402

from quantine import Calibration  # noqa: E402

EXAMPLE = Path(__file__).parents[3] / "examples" / "serve_with_vllm.py"


def test_several_prompts_are_continued(tmp_path: Path, short: Calibration) -> None:
    out = Directories(tmp_path, short).quantized("llama", "all")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for prompt in ("The capital of France is", "Rainbows are", "def square(x):"):
        assert prompt in done.stdout
