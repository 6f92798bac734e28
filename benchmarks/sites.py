"""What each reorder contributes: predictions of a model with the channels of one alone rounded.

    python benchmarks/sites.py MODEL wikitext2_valid.txt wikitext2_test.txt --json sites.json

R1 and R4 are the outputs of norms, R2 queries and keys, R3 values and what attention makes of them,
R5 the hidden channels of the MLP. Weights and everything else are floats. Each number is the KL
divergence from the float model's predictions, by the way grids are made. Rows in the file of
numbers are not made again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from quantine import Calibration, Plan, evaluate, quantize
from quantine.plan.shorthand import PUBLISHED_CLUSTERS

REORDERS = {
    "R1, R4": ("norm",),
    "R2": ("query", "key"),
    "R3": ("value", "attention"),
    "R5": ("hidden",),
}
GRIDS: dict[str, dict[str, Any]] = {
    "clusters, searched": {},
    "clusters, as published": {
        "range": "running",
        "clusters": list(PUBLISHED_CLUSTERS),
        "value_clusters": None,
    },
    "one static grid": {"granularity": "tensor", "range": "minmax"},
    "a grid for each token": {"granularity": "token"},
}


def divergence(asked: argparse.Namespace, activations: dict[str, Any], scratch: Path) -> float:
    """KL divergence in nats of the model with these activations."""
    calibration = Calibration(asked.calibration, asked.samples, asked.seqlen, bfloat16=True)
    out = Path(tempfile.mkdtemp(dir=scratch))
    quantize(
        asked.model, out, Plan.from_dict({"rules": [], "activations": activations}), calibration
    )
    scores = evaluate(
        out,
        [asked.text],
        window=asked.window,
        limit=asked.limit,
        reference=asked.model,
        cache=scratch / "predictions",
    )
    (score,) = scores["texts"].values()
    found: float = score["kl"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("text")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    asked = parser.parse_args()
    file: Path = asked.json
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, fields in GRIDS.items():
            row = rows.setdefault(name, {})
            for reorder, sites in REORDERS.items():
                if reorder not in row:
                    bits = dict.fromkeys(sites, asked.bits)
                    row[reorder] = divergence(asked, {**fields, **bits}, Path(scratch))
                    print(f"{name:24} {reorder:8} {row[reorder]:.5f}", flush=True)
                    file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
