"""Quantizing on a GPU beside the CPU: matrices, a block and a model. Parts of benchmarks/gpu.py.

Every part takes the device and its sizes, so tests run them on the CPU, on little ones.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from allowance import Allowance
from quantine import Calibration, Plan, evaluate, quantize
from quantine.core.spec import QuantSpec
from quantine.errors import CheckpointError
from quantine.kernels.gram import add_gram
from quantine.methods.gptq import GPTQ
from quantine.methods.rtn import RTN
from quantine.methods.solver import Solver
from quantine.methods.spqr import SpQR
from quantine.statistics.hessian import Hessian

Asked = ParamSpec("Asked")
Found = TypeVar("Found")

ROOT = Path(__file__).parents[1]
SOLVERS: dict[str, tuple[Solver, QuantSpec]] = {
    "rtn": (RTN("mse"), QuantSpec(4, 64)),
    "gptq": (GPTQ(), QuantSpec(4, 64)),
    "spqr": (SpQR(), SpQR.default_spec),
}
"""What quantizes a matrix, by the name of the preset that quantizes a model so."""


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama's block."""

    hidden: int
    inner: int
    heads: int
    key_heads: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of its matrices of different shapes."""
        keys = self.hidden // self.heads * self.key_heads
        return {
            "query": (self.hidden, self.hidden),
            "key": (keys, self.hidden),
            "gate": (self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }


EIGHT_BILLION = Shape(4096, 14336, 32, 8)
"""A block of Llama 3 8B."""
CALIBRATION = Calibration(samples=8, seqlen=256)
"""What models are quantized on: a small text, so that the CPU is soon done, too."""
WORSE = 1.2
"""Times the CPU's error from which on that of a matrix quantized on a device is a failure."""
APART = 0.02
"""Share of the CPU's perplexity from which on a model's difference from it is a failure."""
TOKENS, SLICE = 2048, 64
"""Tokens that matrices are quantized on, and rows of them that the CPU quantizes."""


def quantized(device: str, allowance: Allowance) -> dict[str, Any]:
    """Seconds of quantizing on ``device``, and how good the result is beside the CPU's."""
    with tempfile.TemporaryDirectory() as scratch:
        block, model = Path(scratch, "one"), Path(scratch, "other")
        block.mkdir()
        model.mkdir()

        def demo() -> list[dict[str, Any]]:
            try:
                return solved_model("demo", device, CALIBRATION, 512, model, allowance)
            except CheckpointError as error:  # it is not installed here
                allowance.left_out.append(str(error))
                return []

        parts = {
            "block": partial(solved_block, EIGHT_BILLION, device, CALIBRATION, block, allowance),
            "model": demo,
            "matrices": partial(solved_matrices, EIGHT_BILLION, device, TOKENS, SLICE, allowance),
        }
        return {name: allowance.rows(name, find) for name, find in parts.items()}


def seconds_of(
    device: str, function: Callable[Asked, Found], /, *args: Asked.args, **named: Asked.kwargs
) -> tuple[Found, float]:
    """What ``function`` returns, and the seconds until the device has done it."""
    start = time.perf_counter()
    found = function(*args, **named)
    if device == "cuda":
        torch.cuda.synchronize()
    return found, time.perf_counter() - start


def relative_error(weight: Tensor, solved: Tensor, hessian: Hessian) -> float:
    """Squared change of the output over the squared output."""
    return hessian.error_energy(weight - solved) / hessian.error_energy(weight)


def solved_matrices(
    shape: Shape, device: str, tokens: int, rows: int, allowance: Allowance
) -> list[dict[str, Any]]:
    """Seconds of whole matrices on the device; errors of their first ``rows`` there and here.

    An error more than `WORSE` times that here is noted as a failure of the allowance.
    """
    found = []
    for name, (outputs, inputs) in shape.matrices().items():
        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn(outputs, inputs, generator=generator, device=device) * 0.02
        x = torch.randn(tokens, inputs, generator=generator, device=device)
        x = x.add_(x.roll(1, 1)).mul_(torch.logspace(-1, 1, inputs, device=device))
        for method, (solver, spec) in SOLVERS.items():
            if not allowance.allows(f"matrix {name}, {method}"):
                continue
            there, here = (summed(x.to(where)) for where in (device, "cpu"))
            part = weight[:rows]
            errors = [
                relative_error(w, solver(w, hessian, spec).dequantize(), hessian)
                for w, hessian in ((part, there), (part.cpu(), here))
            ]  # and the programs are compiled
            _, spent = seconds_of(device, solver, weight, summed(x), spec)
            row = {
                "matrix": name,
                "outputs": outputs,
                "inputs": inputs,
                "method": method,
                "seconds": round(spent, 3),
                "error": errors[0],
                "error_of_cpu": errors[1],
            }
            print(row, flush=True)
            allowance.demand(
                errors[0] <= WORSE * errors[1],
                f"matrix {name}, {method}: its error is {errors[0]:.3g}, that of the CPU "
                f"{errors[1]:.3g}",
            )
            found.append(row)
    return found


def summed(x: Tensor) -> Hessian:
    """The Hessian of inputs ``x``, where they are."""
    hessian = Hessian(x.shape[1], add_gram, x.device)
    hessian.update(x)
    return hessian


def solved_block(
    shape: Shape, device: str, calibration: Calibration, scratch: Path, allowance: Allowance
) -> list[dict[str, Any]]:
    """Seconds of whole runs on a random model of one block, and of each of its layers."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import build, tiny_config

    config = tiny_config(
        "llama",
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        num_hidden_layers=1,
    )
    model = build(config, scratch / "block")
    found = []
    for method in SOLVERS:
        if not allowance.allows(f"block, {method}"):
            continue
        result, spent = seconds_of(
            device,
            quantize,
            model,
            scratch / method,
            Plan.preset(method),
            calibration,
            device=device,
        )
        layers = {layer["name"]: layer["seconds"] for layer in result.report["layers"]}
        row = {"method": method, "seconds": round(spent, 2), "seconds_of_layers": layers}
        print(row, flush=True)
        found.append(row)
    return found


def solved_model(
    model: str,
    device: str,
    calibration: Calibration,
    window: int,
    scratch: Path,
    allowance: Allowance,
) -> list[dict[str, Any]]:
    """Seconds and perplexities of a model quantized on the device and on the CPU.

    Perplexities more than `APART` from each other are noted as a failure of the allowance.
    """
    found = []
    for method in SOLVERS:
        if not allowance.allows(f"model {model}, {method}"):
            continue
        row: dict[str, Any] = {"model": model, "method": method}
        for where, key in ((device, ""), ("cpu", "_of_cpu")):
            out = scratch / f"{method}{key}"
            _, spent = seconds_of(
                device, quantize, model, out, Plan.preset(method), calibration, device=where
            )
            row[f"seconds{key}"] = round(spent, 2)
            text = next(iter(evaluate(out, window=window, limit=2)["texts"].values()))
            row[f"perplexity{key}"] = text["perplexity"]
        print(row, flush=True)
        here, there = row["perplexity_of_cpu"], row["perplexity"]
        allowance.demand(
            abs(there - here) <= APART * here,
            f"model {model}, {method}: its perplexity is {there:.4g}, that of the CPU's {here:.4g}",
        )
        found.append(row)
    return found
