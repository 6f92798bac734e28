"""Perplexity with groups along inputs, along outputs, and as each matrix chooses (AdaDim).

    python benchmarks/axes.py MODEL wikitext2_valid.txt wikitext2_test.txt --json axes.json

Rows in the file of numbers are not made again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from quantine import Calibration, Plan, evaluate, quantize

PUBLISHED = {"group_size": 64, "clip": "minmax"}
FIELDS: dict[str, dict[str, Any]] = {
    "rtn": PUBLISHED,
    "gptq": PUBLISHED,
    "spqr": {"group_size": 64, "scale_bits": 4},
}
THRESHOLDS = {3: 1.0, 4: 0.3}
"""Of outliers, by bits, unless bits on average are given."""
AXES = ("in", "out")
LOOSE = 8.0
"""Bits per weight that leave nothing but the axis to choose."""


def plan_of(method: str, bits: int, axis: str, average_bits: float | None = None) -> Plan:
    """All matrices of blocks alike; RTN and GPTQ as AdaDim's published code has them.

    Args:
        axis: in `AXES`, or how each matrix chooses: ``"chosen"`` by outputs, ``"predicted"`` by the
            model's predictions.
    """
    fields = {**FIELDS[method], "bits": bits}
    if method == "spqr" and average_bits is None:
        fields["threshold"] = THRESHOLDS[bits]
    elif method == "spqr":
        fields["average_bits"] = average_bits
    if axis == "predicted":
        choices = [{**fields, "method": method, "group_axis": each} for each in AXES]
        rule = {"match": "@blocks", "method": "search"}
        return Plan.from_dict({"rules": [rule], "choices": choices, "bits_per_weight": LOOSE})
    if axis == "chosen":
        fields |= {"method": "adadim", "inner": method}
    else:
        fields |= {"method": method, "group_axis": axis}
    rule = {"match": "@blocks", **fields}
    return Plan.from_dict({"rules": [rule], "float_inputs": method != "spqr"})


def axes_of(method: str, average_bits: float | None) -> tuple[str, ...]:
    """What is compared; the search over predictions knows SpQR, and no average."""
    searched = method == "spqr" and average_bits is None
    return (*AXES, "chosen", "predicted") if searched else (*AXES, "chosen")


def measured(asked: argparse.Namespace, plan: Plan, out: str) -> dict[str, Any]:
    calibration = Calibration(
        asked.calibration, asked.samples, asked.seqlen, bfloat16=asked.bfloat16
    )
    report = quantize(asked.model, out, plan, calibration).report
    (score,) = evaluate(out, asked.text, window=asked.window, limit=asked.limit)["texts"].values()
    layers = report["layers"]
    return {
        "bits_per_weight": report["totals"]["bits_per_weight"],
        "along_outputs": sum(layer["scheme"].get("group_axis") == "out" for layer in layers),
        "matrices": len(layers),
        "seconds": report["run"]["seconds"],
        "perplexity": score["perplexity"],
        "stderr": score["stderr"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("text")
    parser.add_argument("--methods", nargs="+", choices=FIELDS, default=list(FIELDS))
    parser.add_argument("--bits", type=int, nargs="+", choices=THRESHOLDS, default=[3, 4])
    parser.add_argument("--average-bits", type=float, help="of spqr: outliers fill these up")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--bfloat16", action="store_true", help="calibrate in bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text(encoding="utf-8")) if asked.json.is_file() else []
    done = {row["name"] for row in rows}
    for method in asked.methods:
        for bits in asked.bits:
            average = asked.average_bits if method == "spqr" else None
            for axis in axes_of(method, average):
                name = f"{method} {average or bits} {axis}"
                if name in done:
                    continue
                with tempfile.TemporaryDirectory() as out:
                    found = measured(asked, plan_of(method, bits, axis, average), out)
                rows.append({"name": name, **found})
                asked.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
                print(f"{name:18} {found['perplexity']:.3f} +- {found['stderr']:.2f}", flush=True)


if __name__ == "__main__":
    main()
