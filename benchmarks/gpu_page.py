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
from integer_programs import IntegerProduct, tokens_in_words
from marked_parts import write_part
from matrix_programs import Product
from quantine.core.activation_spec import UNQUANTIZED
from roofline import (
    GPUS,
    Compiled,
    Gpu,
    Work,
    attention,
    float16,
    integers,
    norming,
    packed,
    packing,
    seconds,
    token_bytes,
)
from roofline import compiled as what_was_compiled

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
    Product(4, 128, "in", 0, False, True, 1),
    Product(3, 16, "in", 0, True, False, 1),
    Product(3, 16, "in", 0, True, True, 1),
    Product(4, 64, "out", 0, False, False, 1),
)
"""Packed matrices that one row of activations is predicted for, in every shape."""
SEVERAL = (KINDS[0], KINDS[-2], KINDS[-1])
"""Those that more rows are predicted for, in the second shape."""
BATCHES = (4, 16, 256)
"""Rows of activations, by the program for few rows, by tiles, and with the matrix decoded."""
COUNTED = ("MB", "instructions (million)", "tensor operations (billion)")
"""Columns of what is counted, see `sizes`."""
INTEGERS = tuple(IntegerProduct(4, 128, 4096, tokens) for tokens in (1, 16, 256))


def main() -> None:
    for write in (
        predictions,
        several,
        others,
        attentions,
        plans,
        arithmetic,
        compiled,
        measurements,
    ):
        write_part(PAGE, "gpu_page.py", write.__name__, write())


def predictions() -> str:
    """Least microseconds of one row of activations, by shape, kind and GPU."""
    return of_products((*shape, kind) for shape in SHAPES for kind in KINDS)


def several() -> str:
    """The same of several rows of activations, of one shape."""
    return of_products(
        (*SHAPES[1], replace(kind, batch=batch)) for kind in SEVERAL for batch in BATCHES
    )


def of_products(asked: Iterable[tuple[int, int, Product]]) -> str:
    """Least microseconds of products, of so many outputs and inputs, beside those of floats."""
    head = ["outputs x inputs", "weights", "rows", *COUNTED]
    head += [f"{gpu.name}: float16, packed, times" for gpu in GPUS]
    known = what_was_compiled()
    return table(head, (predicted(*each, known) for each in asked))


def predicted(outputs: int, columns: int, kind: Product, known: Compiled) -> list[str]:
    product = replace(kind, columns=columns)
    floats = float16(product, outputs)
    by_gpu = {gpu: packed(product, outputs, gpu.capability, known) for gpu in GPUS}
    row = [f"{outputs} x {columns}", product.weights, str(product.batch), *sizes(by_gpu)]
    for gpu, launches in by_gpu.items():
        slow, fast = seconds([floats], gpu), seconds(launches, gpu)
        row.append(f"{slow * 1e6:.1f}, {fast * 1e6:.1f}, {slow / fast:.1f}")
    return row


def sizes(by_gpu: dict[Gpu, tuple[Work, ...]]) -> list[str]:
    """Megabytes, millions of instructions, billions of tensor operations, as compiled for `SHOWN`.

    What is not counted is empty.
    """
    (launches,) = (found for gpu, found in by_gpu.items() if gpu.capability == SHOWN)
    counts = (
        sum(work.nbytes for work in launches) / 1e6,
        sum(work.instructions for work in launches) / 1e6,
        sum(work.operations + work.byte_operations for work in launches) / 1e9,
    )
    return [f"{n:.1f}" if n >= 0.1 else f"{n:.1g}" if n else "" for n in counts]


def others() -> str:
    """Least microseconds of products in integers, of norms that round, of packing."""
    known, outputs = what_was_compiled(), SHAPES[1][0]
    programs = {
        f"{kind.name}, {outputs} outputs (W4A8 or W4A4)": {
            gpu: (integers(kind, outputs, gpu.capability, known),) for gpu in GPUS
        }
        for kind in INTEGERS
    }
    for tokens in (1, 256):
        name = f"RMSNorm and rounding; 4096 inputs, {tokens_in_words(tokens)}"
        programs[name] = dict.fromkeys(GPUS, (norming(4096, tokens),))
    for tokens in (1, 4096):
        name = f"rounding of keys and values, 4 bits; one layer, {tokens_in_words(tokens)}"
        programs[name] = dict.fromkeys(GPUS, (packing(4, tokens),))
    head = ["program", *COUNTED, *(gpu.name for gpu in GPUS)]
    return table(head, ([name, *sizes(by), *times(by)] for name, by in programs.items()))


def times(by_gpu: dict[Gpu, tuple[Work, ...]]) -> list[str]:
    """Least microseconds of each GPU."""
    found = (seconds(launches, gpu) * 1e6 for gpu, launches in by_gpu.items())
    return [f"{each:.1f}" if each >= 0.1 else f"{each:.1g}" for each in found]


def attentions() -> str:
    """Least microseconds of attention of one query, by length of the context, bits and GPU."""
    head = ["context", "bits", "bytes a token and head", *COUNTED, *(gpu.name for gpu in GPUS)]
    rows = []
    for context in CONTEXTS:
        for bits in (UNQUANTIZED, 8, 4, 3):
            by = dict.fromkeys(GPUS, (attention(bits, context),))
            rows.append([str(context), str(bits), str(token_bytes(bits)), *sizes(by), *times(by)])
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
