"""A model whose roundings AutoRound tuned, judged as `quantine eval` judges models.

    QUANTINE_AUTOROUND_PYTHON=... python benchmarks/against_autoround.py demo CALIBRATION TEXT \\
        OUT.json --work DIR

The variable names a Python with AutoRound 0.16. It starts from the same float weights, and learns
from the segments that `quantine quantize --calibration CALIBRATION --samples` would take. What it
writes in the format of GPTQ is imported, which keeps its numbers. Directories that are in DIR are
not made again. benchmarks/results.py makes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Final

import torch

from against_llm_compressor import float_directory, imported
from llama_cpp_inputs import Inputs
from quantine.eval.evaluate import evaluate

PROGRAM: Final = str(Path(__file__).with_name("autoround_quantizer.py"))


def main() -> None:
    """Quantize, import, score, and write a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("text", help="one, or several with commas between them")
    parser.add_argument("json", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--window", type=int, default=1024)
    asked = parser.parse_args()
    asked.work.mkdir(exist_ok=True)
    base = float_directory(asked.model, asked.work / "float")
    name = f"W{asked.bits} g{asked.group_size}"
    out = asked.work / name.lower().replace(" ", "")
    if not out.exists():
        tuned(base, out, asked)
    (written,) = out.iterdir()
    found = evaluate(
        imported(written, asked.work / f"{out.name}-imported"),
        asked.text.split(","),
        window=asked.window,
        limit=asked.windows,
        reference=asked.model,
        cache=asked.work / "predictions",
    )
    row = {**found, "name": name, "samples": asked.samples, "iterations": asked.iterations}
    print(json.dumps(row), flush=True)
    asked.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


def tuned(base: Path, out: Path, asked: argparse.Namespace) -> None:
    """Let AutoRound write a model into a directory below ``out``."""
    segments = asked.work / "segments.json"
    tokens = Inputs.of(str(base), torch.float32).calibration(asked.samples, asked.calibration)
    segments.write_text(json.dumps(tokens.tolist()), encoding="utf-8")
    python = os.environ["QUANTINE_AUTOROUND_PYTHON"]
    said = map(str, (asked.bits, asked.group_size, asked.iterations))
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, PROGRAM, str(base), str(segments), str(out), *said]
    subprocess.run(command, check=True, env=clean)


if __name__ == "__main__":
    main()
