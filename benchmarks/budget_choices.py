"""What a budget's matrices lose with the schemes it chooses among, and with others.

    python benchmarks/budget_choices.py MODEL TEXT --blocks 5 20 --blur 8 --json choices.json

Each matrix of some blocks is predicted with many grids, as a budget predicts it. For each width the
least loss is read off the lower convex hull of (bits, loss), which is what a budget of many
matrices comes to. Printed is its share of that of `OLD_STEPS`, which budgets chose among before.

Weights of packed files lie on a grid, which some choices then hit by chance. ``--blur L`` adds to
each weight a random number as wide as a step of a grid of L steps from 0 to the largest of 32
inputs: 8 for Q4_0, 16 for Q5_0.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantine import Calibration, Plan
from quantine.calibrate.block_loader import BlockLoader
from quantine.calibrate.sequential import Sequential
from quantine.families.layers import Layer, find_layers
from quantine.methods.spqr import SpQR, sampled_rows
from quantine.plan.presets import CHOICES
from quantine.plan.scheme_parsing import scheme_from
from quantine.run.prepare import prepare
from quantine.statistics.hessian import Hessian

WIDTHS = (2.5, 2.75, 3.0, 3.3, 3.65, 4.0, 4.25, 4.5, 4.7, 5.0)
"""Bits per weight at which losses are compared."""
OLD_STEPS = (
    # bits, group_size, scale_bits, threshold
    (2, 16, 3, "inf"),
    (2, 16, 3, 0.5),
    (3, 64, 4, 1.0),
    (3, 32, 3, 0.5),
    (3, 16, 3, 0.5),
    (4, 64, 4, 0.3),
    (4, 64, 4, 0.1),
    (4, 16, 3, 0.3),
    (5, 64, 4, 0.3),
    (5, 16, 3, 0.3),
    (6, 64, 4, 0.3),
)
STATISTICS = ((3, 0), (4, 0), (5, 0), (3, 3), (3, 4), (4, 3), (4, 4), (4, 5), (5, 5))
"""Bits of scales and of zero points; 0 for zero points in the range of codes."""
THRESHOLDS = {
    2: ("inf", 1.0, 0.5),
    3: (1.0, 0.7, 0.5),
    4: (0.5, 0.3, 0.2),
    5: (0.3, 0.2),
    6: (0.3,),
}
"""Thresholds of outliers, by bits."""
BLOCK = 32
"""Inputs that share a scale in the files that ``--blur`` is for."""

Point = tuple[float, float]
"""Bits per weight, and loss."""


def choice(bits: int, group_size: int, scale: int, threshold: object, **more: object) -> Any:
    """Fields of a scheme, less its axis."""
    return {
        "method": "spqr",
        "bits": bits,
        "group_size": group_size,
        "scale_bits": scale,
        "threshold": threshold,
        **more,
    }


def along_both(fields: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**one, "group_axis": axis} for one in fields for axis in ("in", "out")]


def sets() -> dict[str, list[dict[str, Any]]]:
    """The schemes that are compared, by what they are called."""
    wide = [
        choice(bits, group_size, scale, threshold, zero_bits=zero, stat_group_size=tile)
        for bits, thresholds in THRESHOLDS.items()
        for group_size in (16, 32, 64)
        for scale, zero in STATISTICS
        for threshold in thresholds
        for tile in (64, 128)
    ]
    return {
        "old": along_both([choice(*step) for step in OLD_STEPS]),
        "built in": [dict(one) for one in CHOICES],
        "whole zero points": along_both([one for one in wide if not one["zero_bits"]]),
        "all": along_both(wide),
    }


def blurred(weight: Tensor, steps: int) -> Tensor:
    """The weight, each moved within a step of the grid that it may lie on."""
    groups = weight.view(len(weight), -1, BLOCK)
    step = groups.abs().amax(2, keepdim=True) / steps
    return (groups + (torch.rand_like(groups) - 0.5) * step).view_as(weight)


def points(
    layer: Layer, weight: Tensor, hessian: Hessian, fields: Sequence[dict[str, Any]]
) -> Iterator[Point]:
    """Bits and loss of a matrix with each scheme that fits it."""
    rows = sampled_rows(len(weight), 64)
    # Schemes that solve in one order come together, so that they share the Hessian's factor.
    for one in sorted(fields, key=lambda one: (one["group_axis"], one["group_size"])):
        scheme = scheme_from(dict(one), "a choice")
        assert scheme is not None
        if not scheme.tiles(layer):
            continue
        settled = scheme.settled(layer)
        assert isinstance(settled.solver, SpQR)
        losses, share = settled.solver.predict(weight[rows], hessian, settled.spec)
        yield settled.expected_nbytes(layer, share) * 8 / layer.weights, float(losses.mean())


def hull(found: Sequence[Point]) -> list[Point]:
    """The lower convex hull, from the fewest bits on."""
    kept: list[Point] = []
    for bits, loss in sorted(found):
        if kept and loss >= kept[-1][1]:
            continue
        while len(kept) > 1:
            (b0, l0), (b1, l1) = kept[-2:]
            if (l1 - l0) * (bits - b0) < (loss - l0) * (b1 - b0):
                break
            kept.pop()
        kept.append((bits, loss))
    return kept


def loss_at(kept: Sequence[Point], width: float) -> float | None:
    """The hull's loss at a width; ``None`` outside of it."""
    for (b0, l0), (b1, l1) in pairwise(kept):
        if b0 <= width <= b1:
            return l0 + (l1 - l0) * (width - b0) / (b1 - b0)
    return None


def matrices(asked: argparse.Namespace) -> Iterator[tuple[Layer, Tensor, Hessian]]:
    """The matrices of the blocks, with their weights and the Hessians of their inputs."""
    calibration = Calibration(asked.text, asked.samples, asked.seqlen)
    job = prepare(asked.model, Plan.preset("spqr", bits=4), calibration)
    checkpoint = job.checkpoint()
    sequential = Sequential(job.calibration_setup(checkpoint))
    with BlockLoader(job.model, job.family, checkpoint, job.device) as loader:
        for index in range(max(asked.blocks) + 1):
            loader.load(index)
            if index in asked.blocks:
                inside = [one for one in find_layers(job.model, job.family) if one.block == index]
                for layer, hessian in zip(inside, sequential.observe(index, inside), strict=True):
                    weight = layer.read(job.model)
                    yield layer, blurred(weight, asked.blur) if asked.blur else weight, hessian
            sequential.advance(index)
            loader.release(index)


def ratios(hulls: Mapping[str, Sequence[Point]]) -> dict[str, list[float]]:
    """The logarithms of losses by those of ``old``, at each width; NaN where a hull has none."""
    losses = {
        name: [loss_at(kept, width) or math.nan for width in WIDTHS] for name, kept in hulls.items()
    }
    return {
        name: [math.log(loss / old) for loss, old in zip(row, losses["old"], strict=True)]
        for name, row in losses.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--blur", type=int, help="steps of the grid that weights lie on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, too")
    asked = parser.parse_args()
    torch.manual_seed(0)
    compared = sets()
    rows: list[Tensor] = []
    sizes: list[int] = []
    for layer, weight, hessian in matrices(asked):
        hulls = {
            name: hull(list(points(layer, weight, hessian, fields)))
            for name, fields in compared.items()
        }
        rows.append(torch.tensor(list(ratios(hulls).values())))
        sizes.append(layer.weights)
        print(layer.name, flush=True)
    found, weights = torch.stack(rows), torch.tensor(sizes).view(-1, 1, 1)
    known = ~found.isnan()
    means = (found.nan_to_num() * weights).sum(0) / (known * weights).sum(0)
    shares = dict(zip(compared, means.exp().tolist(), strict=True))
    print(f"{'bits per weight':20}", *(f"{width:6}" for width in WIDTHS))
    for name, row in shares.items():
        print(f"{name:20}", *(f"{share:6.3f}" for share in row))
    if asked.json is not None:
        told = {"model": asked.model, "blur": asked.blur, "widths": WIDTHS, "shares": shares}
        asked.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
