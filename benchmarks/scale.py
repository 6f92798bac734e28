"""Time and memory by model size: recorded runs, and the tables and the picture of docs/scale.md.

    python benchmarks/make_synthetic.py llama-7b m7b --set num_hidden_layers=16
    quantine quantize m7b out --bits 3 --samples 8 --seqlen 512 --calibration wikitext2_valid.txt
    python benchmarks/scale.py record out 7b
    python benchmarks/scale.py page

`record` keeps what a run's report says of its blocks in benchmarks/results/scale-NAME.json. `page`
needs nothing but these files: what was not run follows from them, and is marked so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from gpu_plans import FLOAT32, Matrix, Shape, job_of, least_memory, operations, seconds
from marked_parts import write_part
from quantine import Plan
from quantine.run.job import Job
from quantine.run.peak import process_bytes
from quantine.run.residence import DEVICE_SHARE, residences

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "scale.md"
PICTURE = ROOT / "docs" / "scale.svg"
SHAPES = (
    Shape("1B", 16, 2048, 8192, 32, 8),
    Shape("8B", 32, 4096, 14336, 32, 8),
    Shape("13B", 40, 5120, 13824, 40, 40),
    Shape("70B", 80, 8192, 28672, 64, 8),
    Shape("405B", 126, 16384, 53248, 128, 8),
)
"""Llama's sizes, which the table is about."""
PLAN = Plan.preset("spqr", bits=3)
SEGMENTS = (8, 512)
"""Segments and tokens of each, in the runs and in what follows from them."""
HOURS = 3600.0
CARD_GB = 24 * DEVICE_SHARE
"""GB that a run may take on a GPU of 24 GB."""
CARD, CARDS = "RTX 4090", "H100"
"""The GPU that has 24 GB, and the one of which there are eight."""


def record(out: Path, name: str) -> None:
    """Keep what the report in ``out`` says of time and memory."""
    report = json.loads((out / "quantine_report.json").read_text())
    layers: dict[str, list[float]] = {}
    for layer in report["layers"]:
        layers.setdefault(layer["name"].rpartition(".")[2], []).append(layer["seconds"])
    shapes = {layer["name"].rpartition(".")[2]: layer["shape"] for layer in report["layers"]}
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    kept = {
        "processor": cpu[0].partition(":")[2].strip(),
        "threads": int(report["identity"]["threads (OMP_NUM_THREADS)"]),
        "calibration": report["calibration"],
        "shapes": shapes,
        "totals": report["totals"],
        "run": report["run"],
        "solving_seconds": {kind: round(median(found), 3) for kind, found in layers.items()},
    }
    (RESULTS / f"scale-{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def runs() -> dict[str, dict[str, Any]]:
    """The recorded runs, by name, the smallest block first."""
    files = RESULTS.glob("scale-*.json")
    found = {file.stem.removeprefix("scale-"): json.loads(file.read_text()) for file in files}
    return dict(sorted(found.items(), key=lambda item: block_weights(item[1])))


def block_weights(run: dict[str, Any]) -> int:
    """Weights of one of its blocks, which are all alike."""
    return sum(rows * columns for rows, columns in run["shapes"].values())


def block_seconds(run: dict[str, Any]) -> float:
    """Processor seconds of a block; the first is left out, as it also waits for its weights."""
    return median(block["processor_seconds"] for block in run["run"]["blocks"][1:])


def measured() -> str:
    """A row for each recorded run."""
    lines = [
        [
            "run",
            "blocks",
            "million weights a block",
            "processor seconds a block (least to most)",
            "GB after the first block, the last",
            "peak GB by the first block",
            "peak GB",
        ]
    ]
    for name, run in runs().items():
        blocks = run["run"]["blocks"]
        spread = [block["processor_seconds"] for block in blocks[1:]]
        after = [block["memory_after_bytes"] / 1e9 for block in (blocks[0], blocks[-1])]
        lines.append(
            [
                name,
                str(len(blocks)),
                f"{block_weights(run) / 1e6:.0f}",
                f"{block_seconds(run):.0f} ({min(spread):.0f} to {max(spread):.0f})",
                f"{after[0]:.2f}, {after[1]:.2f}",
                f"{blocks[0]['peak_memory_bytes'] / 1e9:.2f}",
                f"{run['run']['peak_memory_bytes'] / 1e9:.2f}",
            ]
        )
    return table(lines)


def fitted() -> tuple[float, float]:
    """Processor seconds for each weight, and for each operation of products, by the runs."""
    rows, taken = [], []
    for run in runs().values():
        assert (run["calibration"]["samples"], run["calibration"]["seqlen"]) == SEGMENTS
        rows.append([float(block_weights(run)), operations(run_matrices(run), tokens())])
        taken.append(block_seconds(run))
    matrix = torch.tensor(rows, dtype=torch.float64)
    scale = matrix.abs().amax(0)
    known = torch.tensor(taken, dtype=torch.float64).unsqueeze(1)
    found = torch.linalg.lstsq(matrix / scale / known, torch.ones_like(known)).solution[:, 0]
    return tuple((found / scale).tolist())


def run_matrices(run: dict[str, Any]) -> Iterator[Matrix]:
    """Outputs, inputs and group of the matrices of a block of ``run``, of Llama's kinds."""
    groups = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    for kind, (rows, columns) in run["shapes"].items():
        yield rows, columns, groups.get(kind, kind)


def sizes() -> str:
    """A row for each of Llama's sizes: what runs measured, and what follows from them."""
    lines = [
        [
            "model",
            "processor seconds a block",
            "one CPU box: hours on one core",
            "GB of memory: everything kept, nothing kept",
            f"one GPU of 24 GB: GB at least, seconds of products ({CARD})",
            f"eight GPUs: seconds of products ({CARDS})",
        ]
    ]
    per_weight, per_operation = fitted()
    for shape in SHAPES:
        job = job_of(shape, PLAN, SEGMENTS)
        matrices = list(job_matrices(job))
        weights = sum(rows * columns for rows, columns, _ in matrices)
        block = per_weight * weights + per_operation * operations(matrices, tokens())
        least = least_memory(job) / 1e9
        one, eight = seconds(job, FLOAT32[CARD]), seconds(job, FLOAT32[CARDS], 8)
        fits = f"{least:.1f}, {one:.0f}" if least <= CARD_GB else f"{least:.1f}: refused"
        lines.append(
            [
                shape.name,
                f"{block:.0f}, extrapolated",
                f"{block * shape.layers / HOURS:.1f}, extrapolated",
                ", ".join(f"{found:.1f}" for found in memory(shape)) + ", predicted",
                f"{fits}, predicted",
                f"{eight:.0f}, predicted",
            ]
        )
    return table(lines)


def tokens() -> int:
    """Number of tokens of the runs."""
    return SEGMENTS[0] * SEGMENTS[1]


def job_matrices(job: Job) -> Iterator[Matrix]:
    """Outputs, inputs and group of the matrices of the first block of ``job``."""
    for decision in job.block_schemes(0):
        yield decision.layer.out_features, decision.layer.in_features, str(decision.layer.group)


def memory(shape: Shape) -> list[float]:
    """GB that a process on the CPU takes, with everything kept and with nothing."""
    job = job_of(shape, PLAN, SEGMENTS, "cpu")
    places = list(residences(job))
    return [process_bytes(job, place) / 1e9 for place in (places[0], places[-1])]


def table(lines: list[list[str]]) -> str:
    """Markdown of ``lines``, of which the first is the head."""
    head, *rows = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rows])


def draw() -> None:
    """Draw processor time and memory after each block of the deepest run."""
    name, run = max(runs().items(), key=lambda item: len(item[1]["run"]["blocks"]))
    blocks = run["run"]["blocks"]
    numbers = range(1, len(blocks) + 1)
    spent = torch.tensor([block["processor_seconds"] for block in blocks]).cumsum(0) / 60
    figure = Figure(figsize=(7.5, 2.6), layout="constrained")
    figure.suptitle(f"{name}: blocks one after another", fontsize=10)
    left, right = figure.subplots(1, 2)
    left.plot(numbers, spent.tolist(), color="#1b3a6b", marker="o", markersize=3)
    left.set_ylabel("minutes of processor time", fontsize=8)
    for field, label, colour in (
        ("peak_memory_bytes", "most so far", "#c8553d"),
        ("memory_after_bytes", "after the block", "#1b3a6b"),
    ):
        values = [block[field] / 1e9 for block in blocks]
        right.plot(numbers, values, color=colour, marker="o", markersize=3, label=label)
    right.set_ylabel("GB in memory", fontsize=8)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("finished blocks", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(visible=True, color="#eeeeee", linewidth=0.6)
    with matplotlib.rc_context({"svg.hashsalt": "scale"}):  # the same bytes every time
        figure.savefig(PICTURE, metadata={"Date": None})


def page() -> None:
    """Write the parts of the page, and its picture."""
    for write in (measured, sizes):
        write_part(PAGE, "scale.py", write.__name__, write())
    draw()


def main() -> None:
    """Record a run, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    kept = verbs.add_parser("record")
    kept.add_argument("out", type=Path)
    kept.add_argument("name")
    kept.set_defaults(run=lambda arguments: record(arguments.out, arguments.name))
    verbs.add_parser("page").set_defaults(run=lambda _: page())
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
