"""What a GPU of NVIDIA does with packed matrices: tests, times and a JSON, in one command.

    make gpu

Without a GPU it says what it would do. With one it carries out `parts`, from the tests of the
programs to tokens of whole models, and writes benchmarks/results/gpu-NAME.json after each. A part
that fails is a sentence there. Each part has so many seconds, and what those before it left over;
then it stops, and the JSON names what was left out.
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
import gpu_products
import gpu_quantizing
import gpu_tokens
import time_for_tests
from allowance import Allowance
from gpu_graphs import Gpu

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
LONGEST = 60
"""Seconds that one test may take beyond the time of all, before it is ended."""


class Part(NamedTuple):
    """A part of the whole.

    Attributes:
        said: what is done, in words.
        seconds: that it may take. All of them leave two of nine minutes to what is installed first
            and to the last test.
        do: does it, in the time that it is allowed.
    """

    said: str
    seconds: float
    do: Callable[[Allowance], Any]


def parts(gpu: Callable[[], Gpu]) -> dict[str, Part]:
    """What is done on a GPU, in order."""
    contexts = " and ".join(map(str, gpu_attention.CONTEXTS))
    methods = ", ".join(gpu_quantizing.SOLVERS)
    return {
        "products": Part(
            f"time {len(gpu_products.KINDS)} kinds of matrices in {len(gpu_products.SHAPES)} "
            f"shapes for {gpu_products.BATCHES} rows",
            140,
            lambda allowance: gpu_products.timed_products(gpu(), allowance),
        ),
        "integers": Part(
            f"time {len(gpu_products.INTEGERS)} kinds of integer products for "
            f"{gpu_products.INTEGER_BATCHES} tokens",
            30,
            lambda allowance: gpu_products.timed_integers(gpu(), allowance),
        ),
        "attention": Part(
            f"time attention over {contexts} tokens",
            20,
            lambda allowance: gpu_attention.timed_attentions(gpu(), allowance),
        ),
        "tokens": Part(
            f"time tokens of models of 8B shape, {len(gpu_tokens.KINDS)} kinds and bfloat16",
            60,
            lambda allowance: gpu_tokens.timed_models("cuda", allowance),
        ),
        "quantizing": Part(
            f"quantize matrices, a block and the demo model by {methods}, and compare with the CPU",
            90,
            lambda allowance: gpu_quantizing.quantized("cuda", allowance),
        ),
        "tests": Part(f"run {len(TESTS)} files of tests", 90, tested),
    }


def main() -> int:
    if not torch.cuda.is_available():
        print("There is no GPU here that PyTorch knows. With one, this would")
        for part in parts(Gpu).values():
            print(f"  {part.said},")
        print("  and write benchmarks/results/gpu-NAME.json.")
        return 0
    import triton

    gpu = Gpu()
    device = torch.cuda.get_device_name()
    name = re.sub(r"\W+", "-", device).strip("-").lower()
    about = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    about |= {"gigabytes_per_second_copied": round(gpu.bandwidth / 1e9, 1)}
    path = ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    went_well = carried_out(parts(lambda: gpu), about, path)
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
        "TRITON_INTERPRET": "0",  # which gpu_compile took out
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
