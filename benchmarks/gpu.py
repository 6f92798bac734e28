"""What a GPU of NVIDIA does with packed matrices: tests, times and a JSON, in one command.

    make gpu

Without a GPU it says what it would do. With one it carries out the parts of gpu_parts.py, and
writes benchmarks/results/gpu-NAME.json after each. A part that fails is a sentence there. Each part
has so many seconds, and what those before it left over; then it stops, and the JSON names what was
left out.
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
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import torch

import gpu_attention
import gpu_parts
import gpu_products
import gpu_quantizing
import gpu_tokens
import time_for_tests
from allowance import Allowance
from gpu_graphs import Gpu
from gpu_parts import PARTS

ROOT = Path(__file__).parents[1]
TESTS = (
    "tests/kernels/test_triton_matrix.py",
    "tests/kernels/test_triton_experts.py",
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
LONGEST = 60
"""Seconds that one test may take beyond the time of all, before it is ended."""


class Part(NamedTuple):
    """A part: what is done, seconds that it may take, and what does it in the time allowed."""

    said: str
    seconds: float
    do: Callable[[Allowance], Any]


def parts(gpu: Gpu) -> dict[str, Part]:
    """What is done on a GPU, in order."""
    do: dict[str, Callable[[Allowance], Any]] = {
        "products": lambda allowance: gpu_products.timed_products(gpu, allowance),
        "integers": lambda allowance: gpu_products.timed_integers(gpu, allowance),
        "attention": lambda allowance: gpu_attention.timed_attentions(gpu, allowance),
        "tokens": lambda allowance: gpu_tokens.timed_models("cuda", allowance),
        "quantizing": lambda allowance: gpu_quantizing.quantized("cuda", allowance),
        "tests": tested,
    }
    return {name: Part(*planned, do[name]) for name, planned in PARTS.items()}


def main() -> int:
    if not torch.cuda.is_available():
        return gpu_parts.main()
    import triton

    gpu = Gpu()
    device = torch.cuda.get_device_name()
    name = re.sub(r"\W+", "-", device).strip("-").lower()
    about = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    about |= {"gigabytes_per_second_copied": round(gpu.bandwidth / 1e9, 1)}
    path = ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    went_well = carried_out(parts(gpu), about, path)
    print(f"{path} written")
    return int(not went_well)


def carried_out(
    asked: dict[str, Part],
    about: dict[str, Any],
    path: Path,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Carry out parts one after the other, and write all that was found after each.

    Args:
        asked: as `parts` gives them.
        about: fields of the JSON that say where this runs.
        path: of the JSON. There ``seconds`` are those of parts, and ``left_out`` names what no time
            was left for, and ``failed`` what failed of parts that found the rest.
        clock: seconds that pass.

    Returns:
        Whether every part went well; one that stopped for time did.
    """
    found, well, end = dict(about), True, clock()
    found |= {"seconds": {}, "left_out": {}, "failed": {}}
    for name, part in asked.items():
        print(f"{part.said} ...", flush=True)
        begun, end = clock(), end + part.seconds
        allowance = Allowance(end, clock)
        try:
            found[name] = part.do(allowance)
        except Exception as error:  # what other parts find must not be lost
            found[name], well = f"failed: {error}", False
        found["seconds"][name] = round(clock() - begun, 1)
        if allowance.left_out:
            found["left_out"][name] = allowance.left_out
        if allowance.failed:
            found["failed"][name], well = allowance.failed, False
        path.write_text(json.dumps(found, indent=1) + "\n")
    return well


def tested(allowance: Allowance) -> dict[str, str]:
    """What pytest says at the end of the tests of the programs, on the GPU.

    Raises:
        RuntimeError: a test failed.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", time_for_tests.__name__, *TESTS]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    on_gpu = os.environ | {
        "TRITON_INTERPRET": "0",  # the tests set it to 1 where nothing is said
        "SECONDS_FOR_TESTS": str(allowance.left),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    ran = subprocess.run(
        command,
        cwd=ROOT,
        env=on_gpu,
        check=False,
        capture_output=True,
        text=True,
        timeout=allowance.left + LONGEST,
    )
    print(ran.stdout[-4000:], flush=True)
    ended = ran.stdout.strip().rpartition("\n")[2]
    if ran.returncode != 0:
        raise RuntimeError(f"pytest ended with {ran.returncode}: {ended}")
    lines = ran.stdout.splitlines()
    begin = time_for_tests.LEFT_OUT
    allowance.left_out += [line.removeprefix(begin) for line in lines if line.startswith(begin)]
    return {"pytest": ended}


if __name__ == "__main__":
    sys.exit(main())
