"""What a GPU of NVIDIA does with packed matrices: tests, times and a JSON, in one command.

    make gpu

Without a GPU it says what it would do. With one it runs each of `parts`, from the tests of the
programs to tokens of whole models, and writes benchmarks/results/gpu-NAME.json after each. A part
that fails is a sentence there. No part begins after `LIMIT` seconds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch

import gpu_attention
import gpu_products
import gpu_quantizing
import gpu_tokens

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/kernels/test_triton_matrix.py",
    "tests/kernels/test_triton_columns.py",
    "tests/kernels/test_gram.py",
    "tests/kernels/test_triton_integer.py",
    "tests/kernels/test_triton_rounding.py",
    "tests/kernels/test_triton_packing.py",
    "tests/kernels/test_triton_attention.py",
    "tests/kernels/test_triton_fit.py",
    "tests/kernels/test_triton_solvers.py",
    "tests/runtime/test_on_a_gpu.py",
)
MOST = 240
"""Seconds that the tests take at most: nearly every example is another program to compile."""
LIMIT = 480
"""Seconds after which no part begins: the whole is to take less than nine minutes."""


def parts() -> dict[str, tuple[str, Callable[[], Any]]]:
    """What is done on a GPU, in order: by name, what it is in words and the function."""
    contexts = " and ".join(map(str, gpu_attention.CONTEXTS))
    methods = ", ".join(gpu_quantizing.SOLVERS)
    return {
        "products": (
            f"time {len(gpu_products.KINDS)} kinds of matrices in {len(gpu_products.SHAPES)} "
            f"shapes for {gpu_products.BATCHES} rows",
            gpu_products.timed_products,
        ),
        "integers": (
            f"time {len(gpu_products.INTEGERS)} kinds of integer products for "
            f"{gpu_products.INTEGER_BATCHES} tokens",
            gpu_products.timed_integers,
        ),
        "attention": (
            f"time attention over {contexts} tokens",
            gpu_attention.timed_attentions,
        ),
        "tokens": (
            f"time tokens of models of 8B shape, {len(gpu_tokens.KINDS)} kinds and bfloat16",
            lambda: gpu_tokens.timed_models("cuda", gpu_tokens.LLAMA_8B),
        ),
        "tests": (f"run {len(TESTS)} files of tests", tested),
        "quantizing": (
            f"quantize matrices, a block and the demo model by {methods}, and compare with the CPU",
            lambda: gpu_quantizing.quantized("cuda"),
        ),
    }


def main() -> int:
    if not torch.cuda.is_available():
        print("There is no GPU here that PyTorch knows. With one, this would")
        for said, _ in parts().values():
            print(f"  {said},")
        print("  and write benchmarks/results/gpu-NAME.json.")
        return 0
    import triton

    device = torch.cuda.get_device_name()
    name = re.sub(r"\W+", "-", device).strip("-").lower()
    about = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    path = ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    went_well = carried_out(parts(), about, path)
    print(f"{path} written")
    return int(not went_well)


def carried_out(
    asked: dict[str, tuple[str, Callable[[], Any]]],
    about: dict[str, Any],
    path: Path,
    limit: float = LIMIT,
) -> bool:
    """Carry out parts one after the other, and write all that was found after each.

    Args:
        asked: as `parts` gives them.
        about: fields of the JSON that say where this runs.
        path: of the JSON.
        limit: seconds after which no part begins.

    Returns:
        Whether every part went well.
    """
    started, found, well = time.monotonic(), dict(about), True
    for part, (said, do) in asked.items():
        print(f"{said} ...", flush=True)
        begun = time.monotonic()
        try:
            found[part] = do() if begun - started < limit else "left out: no time was left"
        except Exception as error:  # what other parts find must not be lost
            found[part] = f"failed: {error}"
        well = well and not isinstance(found[part], str)
        found.setdefault("seconds", {})[part] = round(time.monotonic() - begun, 1)
        path.write_text(json.dumps(found, indent=1) + "\n")
    return well


def tested() -> dict[str, str]:
    """What pytest says at the end of the tests of the programs, on the GPU.

    Raises:
        RuntimeError: a test failed.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    on_gpu = os.environ | {"TRITON_INTERPRET": "0"}  # which gpu_compile took out
    ran = subprocess.run(
        command, cwd=ROOT, env=on_gpu, check=False, capture_output=True, text=True, timeout=MOST
    )
    print(ran.stdout[-4000:], flush=True)
    ended = ran.stdout.strip().rpartition("\n")[2]
    if ran.returncode != 0:
        raise RuntimeError(f"pytest ended with {ran.returncode}: {ended}")
    return {"pytest": ended}


if __name__ == "__main__":
    sys.exit(main())
