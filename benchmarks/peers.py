"""Files of llama.cpp's types with an importance matrix, judged as `quantine eval` judges models.

    QUANTINE_LLAMA_CPP_PYTHON=... python benchmarks/peers.py demo CALIBRATION TEXT OUT.json \\
        --work DIR

llama.cpp's quantizer makes them from the same float weights, and gets the mean square of each input
over the segments that `quantine quantize --calibration CALIBRATION --samples` would take. Bits per
weight are those of the matrices in blocks, from the files. Files that are in DIR are not made
again. benchmarks/results.py makes the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Final

from llama_cpp_files import float_and_importance, quantized_by_engine
from quantine.eval.evaluate import evaluate
from quantine.source.gguf.parts import read_parts

TARGETS: Final = ("IQ3_XS", "Q3_K_M", "IQ4_XS", "Q4_K_M")


def main() -> None:
    """Write a row for each type."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("text", help="one, or several with commas between them")
    parser.add_argument("json", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--window", type=int, default=1024)
    asked = parser.parse_args()
    asked.work.mkdir(exist_ok=True)
    base, importance = float_and_importance(
        asked.model, asked.samples, asked.work, asked.calibration
    )
    rows = []
    for target in asked.targets:
        file = quantized_by_engine(base, importance, target, asked.work)
        found = evaluate(
            file,
            asked.text.split(","),
            window=asked.window,
            limit=asked.windows,
            reference=asked.model,
            cache=asked.work / "predictions",
        )
        rows.append({**found, "name": target, "bits_per_weight": bits_in_blocks(file)})
        print(target, rows[-1]["bits_per_weight"], found["texts"], flush=True)
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")


def bits_in_blocks(file: Path) -> float:
    """Bits per weight of the matrices in blocks."""
    matrices = [
        tensor
        for part in read_parts(file)
        for tensor in part.tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    ]
    weights = sum(rows * columns for rows, columns in (tensor.shape for tensor in matrices))
    return 8 * sum(tensor.nbytes for tensor in matrices) / weights


if __name__ == "__main__":
    main()
