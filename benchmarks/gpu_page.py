"""Write the tables of docs/gpu.md: what GPUs allow, programs as compiled, what `make gpu` measured.

    python benchmarks/gpu_page.py

Predictions are of benchmarks/roofline.py, gpu_plans.py and gpu_predictions.py; what the compiler
made is benchmarks/results/compiled.json, and measurements are benchmarks/results/gpu-*.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_plans
import gpu_predictions
from marked_parts import write_part
from matrix_programs import Product
from quantine.core.activation_spec import UNQUANTIZED
from roofline import GPUS, attention, float16, packed, seconds, token_bytes

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gpu.md"
RESULTS = ROOT / "benchmarks" / "results"
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 4096), (128256, 4096))
"""Outputs and inputs of the predicted products."""
SHOWN = "9.0"
"""Compute capability whose programs are shown one by one."""
CONTEXTS = (4096, 32768)
"""Tokens that one query of attention meets."""
KINDS = (
    Product(4, 128, "in", 0, False, False, 1),
    Product(3, 128, "in", 0, False, False, 1),
    Product(5, 128, "in", 0, False, False, 1),
    Product(8, 128, "in", 0, False, False, 1),
    Product(3, 16, "in", 0, True, True, 1),
    Product(4, 64, "out", 0, False, False, 1),
)


def main() -> None:
    for write in (predictions, attentions, plans, arithmetic, compiled, measurements):
        write_part(PAGE, "gpu_page.py", write.__name__, write())


def predictions() -> str:
    """Least microseconds of one row of activations, by shape, kind and GPU."""
    head = ["outputs x inputs", "weights", "MB", "instructions (million)"]
    head += [f"{gpu.name}: float16, packed, times" for gpu in GPUS]
    return table(head, (predicted(shape, kind) for shape in SHAPES for kind in KINDS))


def predicted(shape: tuple[int, int], kind: Product) -> list[str]:
    outputs, columns = shape
    product = replace(kind, columns=columns)
    work, floats = packed(product, outputs), float16(product, outputs)
    cells = [
        f"{outputs} x {columns}",
        product.weights,
        f"{work.nbytes / 1e6:.1f}",
        f"{(work.integer + work.half) / 1e6:.0f}",
    ]
    for gpu in GPUS:
        slow, fast = seconds(floats, gpu), seconds(work, gpu)
        cells.append(f"{slow * 1e6:.1f}, {fast * 1e6:.1f}, {slow / fast:.1f}")
    return cells


def attentions() -> str:
    """Least microseconds of attention of one query, by length of the context, bits and GPU."""
    head = ["context", "bits", "bytes a token and head", "MB", *(gpu.name for gpu in GPUS)]
    rows = []
    for context in CONTEXTS:
        for bits in (UNQUANTIZED, 8, 4, 3):
            work = attention(bits, context)
            times = (f"{seconds(work, gpu) * 1e6:.1f}" for gpu in GPUS)
            size = f"{work.nbytes / 1e6:.1f}"
            rows.append([str(context), str(bits), str(token_bytes(bits)), size, *times])
    return table(head, rows)


def plans() -> str:
    """What quantizing models takes, as `quantine plan` predicts it."""
    return table(gpu_plans.head(), gpu_plans.rows())


def arithmetic() -> str:
    """Seconds of the stages of quantizing."""
    return gpu_predictions.page()


def compiled() -> str:
    """Each program for compute capability 9.0, and the worst of the others."""
    outcome = json.loads((RESULTS / "compiled.json").read_text())
    found = outcome["programs"]
    shown = [row for row in found if row["capability"] == SHOWN]
    others = sorted({row["capability"] for row in found} - {SHOWN}, key=float)
    worst = {name: max(row[name] for row in found) for name in ("registers", "spilled", "local")}
    head = ["program", "warps", "registers", "spilled", "shared memory"]
    head += ["16-byte loads", "of codes", "barriers", "tensor core"]
    head += ["float16", "integer", "all"]
    return (
        f"Triton {outcome['triton']}, capability {SHOWN}. With {', '.join(others)}: at most "
        f"{worst['registers']} registers, {worst['spilled']} bytes spilled, {worst['local']} of "
        f"local memory.\n\n{table(head, map(compiled_row, shown))}"
    )


def compiled_row(row: dict[str, Any]) -> list[str]:
    numbers = [row[name] for name in ("warps", "registers", "spilled", "shared")]
    loads = f"{row['wide_loads']} of {row['loads']}"
    of_codes = f"{row['wide_code_loads']} of {row['code_loads']}" if row["code_loads"] else ""
    cells = [row["name"], *map(str, numbers), loads, of_codes]
    cells += [str(row["barriers"]), str(row["tensor_core"])]
    if not row["units"]:
        return [*cells, "", "", ""]
    counted = (row[name] / row["units"] for name in ("half", "integer", "instructions"))
    return [*cells, *(f"{count:.1f}" for count in counted)]


def measurements() -> str:
    """The products of every file that `make gpu` wrote, or a sentence that there is none."""
    found = sorted(RESULTS.glob("gpu-*.json"))
    if not found:
        return "Not yet measured on any GPU."
    return "\n\n".join(measured(json.loads(path.read_text())) for path in found)


def measured(outcome: dict[str, Any]) -> str:
    """A table for each list of rows that was found, its columns called as in the JSON."""
    found = dict(outcome)
    quantizing = found.pop("quantizing", None)
    if isinstance(quantizing, dict):
        found |= {f"quantizing: {name}": rows for name, rows in quantizing.items()}
    tables = [
        f"{name.capitalize()}:\n\n{table(list(rows[0]), map(cells, rows))}"
        for name, rows in found.items()
        if isinstance(rows, list) and rows
    ]
    left = outcome.get("left_out", {})
    rest = [f"Left out of {name} for want of time: {'; '.join(left[name])}." for name in left]
    failed = outcome.get("failed", {})
    rest += [f"Failed of {name}: {'; '.join(failed[name])}." for name in failed]
    about = f"{outcome['device']}, PyTorch {outcome['torch']}"
    speed = outcome.get("gigabytes_per_second_copied")
    about += f"; its memory copies {speed} GB/s." if speed else "."
    return "\n\n".join([about, *tables, *rest])


def cells(row: dict[str, Any]) -> list[str]:
    return [str(value) for value in row.values()]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("| --- ", "|---")


if __name__ == "__main__":
    main()
