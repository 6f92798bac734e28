"""Quantine's own files against those of llama.cpp: bytes, quality, and speed side by side.

    QUANTINE_LLAMA_CPP_PYTHON=... python benchmarks/against_llama_cpp.py demo OUT.json --work DIR
    ... --only speed

Without the environment variable, llama.cpp is built first (`make .venv-llama-cpp/bin/python`). All
files come from the same float weights; llama.cpp's quantizer gets an importance matrix of the text
that quantine calibrates on. Files that are in DIR are not made again, and neither are scores that
OUT.json has for the same text; speeds are measured anew, unless only quality is asked for.

Speeds are medians of rounds, in which everything is measured in turn: reading a prompt of 512
tokens at once, and writing tokens, each the most likely one, after 128 and after 4096. Quantine
decodes natively with the arithmetic that its directory asks for. benchmarks/llama_cpp_tables.py
makes the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from llama_cpp_files import (
    float_and_importance,
    nbytes,
    own_scores,
    python_of_llama_cpp,
    quantized_by_engine,
    sizes,
)
from llama_cpp_inputs import TEXT
from quantine import Calibration, Plan, quantize
from quantine.kernels import backend
from quantine.runtime.decoder import decoder_for, most_likely
from quantine.runtime.load import load_packed
from quantine.source.locate import locate

ROOT: Final = Path(__file__).resolve().parent.parent
TARGETS: Final = ("Q3_K_M", "Q4_0", "Q4_K_M", "IQ4_XS")
"""Files of llama.cpp, by its names."""
PROMPT: Final = 512
WRITTEN: Final = 24
"""Tokens written in one measurement."""
CONTEXTS: Final = (128, 4096)
THREADS: Final = (1, 2)
Stopwatch = Callable[[str, int, int, int], float]
"""Seconds for ``"read"`` or ``"write"``, threads, tokens before, and tokens."""


def main() -> None:
    """Make all files, measure what is asked, write a row for each."""
    arguments = _arguments()
    work = arguments.work
    work.mkdir(exist_ok=True)
    if "QUANTINE_LLAMA_CPP_PYTHON" not in os.environ:
        os.environ["QUANTINE_LLAMA_CPP_PYTHON"] = built()
    base, importance = float_and_importance(arguments.model, arguments.samples, work)
    theirs = {t: quantized_by_engine(base, importance, t, work) for t in arguments.targets}
    ours = {bits: own_directory(arguments, bits) for bits in arguments.bits}
    said = {key: vars(arguments)[key] for key in ("samples", "windows", "window")}
    known = scored(arguments.json, said)
    rows = [{"name": "float", "by": "float", "path": base, **sizes(base)}]
    rows += [{"name": t, "by": "llama.cpp", "path": p, **sizes(p)} for t, p in theirs.items()]
    rows += [
        {"name": f"{bits} bits", "by": "quantine", "path": p, "file_bytes": nbytes(p)}
        for bits, p in ours.items()
    ]
    rows = [known.get(row["name"], {}) | row for row in rows]
    if arguments.only != "speed":
        for row in (row for row in rows if "here" not in row):
            asked = (row["path"], base, arguments.window, arguments.windows, work / "predictions")
            row["here"] = own_scores(*asked)
            print(row["name"], row["here"], flush=True)
    if arguments.only != "quality":
        speeds = interleaved(rows[1:], arguments.rounds)
        for row in rows[1:]:
            row["tokens_per_second"] = speeds[row["name"]]
        native = backend.native()
        said |= {"rounds": arguments.rounds, "level": None if native is None else native.level()}
    for row in rows:
        del row["path"]
    arguments.json.write_text(json.dumps({**said, "rows": rows}, indent=1) + "\n")


def scored(path: Path, said: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run by name, if it said the same of its text."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {row["name"]: row for row in old.get("rows", []) if said.items() <= old.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("json", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--targets", nargs="*", default=TARGETS)
    parser.add_argument("--bits", nargs="*", type=float, default=(3.65, 4.25), help="in blocks")
    parser.add_argument("--head-bits", type=int, default=8, help="of token table and head")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("quality", "speed"))
    return parser.parse_args()


def built() -> str:
    """The Python with llama.cpp that `make engines` uses, built where it is missing."""
    name = ".venv-llama-cpp/bin/python"
    subprocess.run(["make", name], cwd=ROOT, check=True)
    return str(ROOT / name)


def own_directory(arguments: argparse.Namespace, bits: float) -> Path:
    """The directory with a budget of ``bits``, made where it is missing."""
    out: Path = arguments.work / f"{bits}-bits"
    if not (out / "config.json").exists():
        plan = Plan.budget(bits).with_head(arguments.head_bits)
        quantize(arguments.model, out, plan, Calibration(TEXT, arguments.samples))
    return out


def interleaved(rows: Sequence[dict[str, Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Tokens per second of each row, by kind of work and threads."""
    watches = stopwatches(rows)
    kinds = [("read", 0, PROMPT), *(("write", context, WRITTEN) for context in CONTEXTS)]
    found: dict[str, dict[str, float]] = {name: {} for name in watches}
    for work, before, tokens in kinds:
        for threads in THREADS:
            taken: dict[str, list[float]] = {name: [] for name in watches}
            for number in range(-1, rounds):  # the first round warms up
                for name, watch in watches.items():
                    taken[name].append(watch(work, threads, before, tokens))
                    print(number, work, before, threads, name, taken[name][-1], flush=True)
            what = "prompt" if work == "read" else f"after {before}"
            for name, values in taken.items():
                speed = tokens / statistics.median(values[1:])
                found[name][f"{what}, {threads} threads"] = speed
    return found


def stopwatches(rows: Sequence[dict[str, Any]]) -> dict[str, Stopwatch]:
    """What measures each row."""
    room = max(CONTEXTS) + PROMPT
    files = [str(row["path"]) for row in rows if row["by"] == "llama.cpp"]
    program = str(Path(__file__).with_name("llama_cpp_decoder.py"))
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    served = subprocess.Popen(
        [python_of_llama_cpp(), program, str(room), *files],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=clean,
    )
    found: dict[str, Stopwatch] = {}
    for row in rows:
        if row["by"] == "llama.cpp":
            found[row["name"]] = theirs_timed(served, files.index(str(row["path"])))
        else:
            found[row["name"]] = own_timed(row["path"], room)
    return found


def theirs_timed(served: subprocess.Popen[str], number: int) -> Stopwatch:
    """Measures a file in the program that has llama.cpp."""
    assert served.stdin is not None
    assert served.stdout is not None
    asked, answers = served.stdin, served.stdout

    def seconds(work: str, threads: int, before: int, tokens: int) -> float:
        asked.write(json.dumps([number, work, threads, before, tokens]) + "\n")
        asked.flush()
        return float(json.loads(answers.readline()))

    return seconds


def own_timed(directory: Path, room: int) -> Stopwatch:
    """Measures a directory, decoded natively."""
    model = load_packed(locate(directory), torch.float32)
    decoders = {threads: decoder_for(model, room, threads=threads) for threads in THREADS}

    def seconds(work: str, threads: int, before: int, tokens: int) -> float:
        decoder = decoders[threads]
        if decoder.position < before:
            decoder.append(torch.arange(decoder.position, before) % 97 + 3)
        decoder.truncate(before)
        started = time.perf_counter()
        if work == "read":
            decoder.append(torch.arange(tokens) % 97 + 3)
        else:
            token = 3
            for _ in range(tokens):
                token = most_likely(decoder.append(torch.tensor([token])))
        return time.perf_counter() - started

    return seconds


if __name__ == "__main__":
    main()
