"""What rotating a model buys: the same plans with a rotation, without, and with it instead.

    python benchmarks/rotation.py demo wikitext2_valid.txt \
        --texts wikitext2_test.txt c4_en_validation_500.jsonl --json rotation-demo.json

"Instead" is a rotation without what it competes with: GPTQ instead of SpQR at as many bits, and one
cluster of channels where a rotation mixes them: norm outputs and values. Rows in the file of
numbers are not made again, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantine import Calibration, Plan, evaluate, quantize
from quantine.core.transform_spec import Rotate

ROTATED = "rotated "
ONE_CLUSTER = (1, 256, 1, 1, 32)
"""Clusters of the reorders where only inputs that are not rotated keep theirs."""
SCHEMES = ("W4A4", "W4A4-strict", "W4A4KV", "W3A3KV")


def plans() -> dict[str, Plan]:
    """All plans by the names of their rows."""
    spqr = {"bits": 3, "group_size": 64, "scale_bits": 4, "average_bits": 3.3}
    found = {
        "GPTQ 3 bits g64": Plan.preset("gptq", bits=3, group_size=64),
        "SpQR 3.3 bits": Plan.preset("spqr", **spqr),
        "budget 3.3 bits": Plan.budget(3.3, ("in", "out")),
    }
    for scheme in SCHEMES:
        found[scheme] = Plan.scheme(scheme)
        grouped = Plan.scheme(scheme, group_size=64)
        assert grouped.activations is not None
        one = replace(grouped.activations, clusters=ONE_CLUSTER, value_clusters=1)
        found[f"{scheme} one cluster"] = replace(grouped, activations=one)
    turned = {
        f"{ROTATED}{name}": replace(plan, transforms=(Rotate(),)) for name, plan in found.items()
    }
    return {**found, **turned}


def measured(asked: argparse.Namespace, plan: Plan, scratch: Path) -> dict[str, Any]:
    """What the model is worth under ``plan``."""
    calibration = Calibration(asked.calibration, asked.samples, asked.seqlen, bfloat16=True)
    started = time.process_time()
    out = scratch / "out"
    report = quantize(asked.model, out, plan, calibration).report
    seconds = time.process_time() - started
    scores = evaluate(
        out,
        asked.texts,
        window=asked.window,
        limit=asked.limit,
        reference=asked.model,
        cache=asked.cache,
    )["texts"]
    nbytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    shutil.rmtree(out)
    bits = report["totals"]["bits_per_weight"]
    return {"bits_per_weight": bits, "bytes": nbytes, "cpu_seconds": seconds, "texts": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--rows", nargs="+", default=list(plans()), help="default all")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--cache", type=Path, metavar="DIR", required=True)
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text(encoding="utf-8")) if asked.json.is_file() else []
    for name in asked.rows:
        if any(row["name"] == name for row in rows):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            row = {"name": name, **measured(asked, plans()[name], Path(scratch))}
        rows.append(row)
        asked.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        kl = "   ".join(f"KL {score['kl']:.4f}" for score in row["texts"].values())
        bits, seconds = row["bits_per_weight"], row["cpu_seconds"]
        print(f"{name:32} {bits:.3f} bits   {kl}   {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
