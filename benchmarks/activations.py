"""What rounding one site of activations alone does to a block's output, by kind of grid.

    python benchmarks/activations.py MODEL TEXT --bits 4 --blocks 0 3
    python benchmarks/activations.py MODEL TEXT --clusters 1 2 4 8 16 32 64 --plot clusters.png
    python benchmarks/activations.py MODEL TEXT --rotated --blocks 5 15 25

The second compares numbers of clusters, all with grids from smallest to largest value, the third
inputs of matrices in clusters and rotated. Weights are floats. Each number is the mean over blocks
and tokens of the squared change of a block's output relative to the token's square.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch

from quantine import Calibration, Plan
from quantine.calibrate.block_loader import BlockLoader
from quantine.calibrate.sequential import Sequential
from quantine.core.activation_spec import INPUT_SITES, REORDERS, SITES, UNQUANTIZED, ActivationSpec
from quantine.families.layers import block_list
from quantine.plan.shorthand import PUBLISHED_CLUSTERS
from quantine.rptq.blocks import reorder_block
from quantine.rptq.choose_grids import ranking_batches
from quantine.rptq.reordering import Heads
from quantine.run.job import Job
from quantine.run.prepare import prepare
from quantine.statistics.losses import token_loss

VARIANTS = {
    "clusters, as published": {
        "range": "running",
        "clusters": PUBLISHED_CLUSTERS,
        "value_clusters": None,
    },
    "clusters, searched": {"range": "search"},
    "one static grid": {"granularity": "tensor", "range": "minmax"},
    "a grid for each token": {"granularity": "token"},
}
BESIDE_ROTATED: dict[str, dict[str, Any]] = {
    "clusters, searched": {},
    "rotated, searched": {"rotated": INPUT_SITES},
}
"""What is rounded is rotated, of the sites that are listed."""
MEASURED = tuple(site for site in SITES if site != "softmax")


def variants_of(counts: list[int] | None) -> dict[str, dict[str, Any]]:
    """Fields of the activations' spec, by the name of what is compared."""
    if counts is None:
        return VARIANTS
    return {
        f"{n} clusters": {
            "range": "minmax",
            "clusters": (n,) * len(REORDERS),
            "value_clusters": None,
        }
        for n in counts
    }


def changes(
    job: Job,
    sequential: Sequential,
    index: int,
    bits: int,
    sites: tuple[str, ...],
    variants: dict[str, dict[str, Any]],
) -> dict[str, list[float]]:
    """The change of block ``index`` for each site, by variant."""
    blocks, heads = block_list(job.model, job.family), Heads.of(job.config, job.family)
    block = blocks[index]
    expected = sequential.outputs(index, ranking_batches(sequential))
    found: dict[str, list[float]] = {}
    for name, fields in variants.items():
        for site in sites:
            blocks[index] = copy.deepcopy(block)
            rotated = tuple(one for one in fields.get("rotated", ()) if one == site)
            one = ActivationSpec(**{site: bits, **fields, "rotated": rotated})
            reorder_block(sequential, index, blocks[index], job.family, heads, one)
            outputs = sequential.outputs(index, ranking_batches(sequential))
            change = token_loss(expected, outputs).value
            found.setdefault(name, []).append(change)
    blocks[index] = block
    return found


def plot(counts: list[int], changed: dict[str, list[float]], bits: int, path: Path) -> None:
    """Change of the output against the number of clusters, a line for each site."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for site, values in zip(MEASURED, zip(*changed.values(), strict=True), strict=True):
        axes.plot(counts, values, marker="o", markersize=4, label=site)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, map(str, counts))
    axes.set_yscale("log")
    axes.set_xlabel("clusters (of queries, keys and values: for each head)")
    axes.set_ylabel("squared change of a token's output, relative")
    axes.set_title(f"One site at a time in {bits} bits")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--clusters", type=int, nargs="+", help="numbers of clusters to compare")
    parser.add_argument("--rotated", action="store_true", help="compare with rotated inputs")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what --clusters compares")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, too")
    asked = parser.parse_args()
    if asked.plot is not None and asked.clusters is None:
        parser.error("--plot draws what --clusters compares")
    variants = BESIDE_ROTATED if asked.rotated else variants_of(asked.clusters)
    sites = INPUT_SITES if asked.rotated else MEASURED
    calibration = Calibration(asked.text, asked.samples, asked.seqlen)
    plan = Plan.scheme(f"W{UNQUANTIZED}A8")
    job = prepare(asked.model, plan, calibration)
    assert job.segments is not None
    checkpoint = job.checkpoint()
    sequential = Sequential(job.calibration_setup(checkpoint))
    totals = {name: torch.zeros(len(sites)) for name in variants}
    with BlockLoader(job.model, job.family, checkpoint, job.device) as loader:
        for index in range(max(asked.blocks) + 1):
            loader.load(index)
            if index in asked.blocks:
                changed = changes(job, sequential, index, asked.bits, sites, variants)
                for name, found in changed.items():
                    totals[name] += torch.tensor(found) / len(asked.blocks)
            sequential.advance(index)
            loader.release(index)
    found = {"sites": sites, "changes": {name: row.tolist() for name, row in totals.items()}}
    for name, changed in found["changes"].items():
        cells = zip(sites, changed, strict=True)
        print(f"{name:24}", *(f"{site} {value:.2e}" for site, value in cells))
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if asked.plot is not None:
        plot(asked.clusters, found["changes"], asked.bits, asked.plot)


if __name__ == "__main__":
    main()
