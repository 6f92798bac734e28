"""Hashes of what quantizing gives, to compare two commits: a change of structure changes none.

    python benchmarks/same_bytes.py demo hashes.json            # on the one commit
    python benchmarks/same_bytes.py demo hashes.json --compare  # on the other

Every plan is quantized by the command line of the installed quantine, with little calibration text.
What is hashed is the weight files, the maps for pictures, ``config.json``, and of the report what
does not measure time or name a version. Compare on one machine, with one number of threads: the
order in which sums of floats are cut depends on both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

PLANS: Final[dict[str, list[str]]] = {
    "rtn": ["--method", "rtn", "--bits", "3", "--samples", "0"],
    "gptq": ["--method", "gptq", "--bits", "3"],
    "spqr": ["--method", "spqr", "--bits", "3"],
    "budget": ["--bits-per-weight", "3.3", "--both-axes", "--head-bits", "8"],
    "W4A4KV": ["--scheme", "W4A4KV"],
    "W4A4": ["--scheme", "W4A4", "--bfloat16"],
    "spqr-faithful": ["--preset", "spqr-faithful"],
    "gptq-ada-3bit": ["--preset", "gptq-ada-3bit"],
    "spqr-ada-3bit": ["--preset", "spqr-ada-3bit"],
}
CALIBRATION: Final = ["--samples", "8", "--seqlen", "128", "--quiet"]
VARYING: Final = ("run", "versions", "seconds", "identity")


def main() -> int:
    """Print a row a plan; the exit status is 1 if a hash is not that of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("file", type=Path, help="written, or with --compare read")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    arguments = parser.parse_args()
    known = json.loads(arguments.file.read_text()) if arguments.compare else {}
    found: dict[str, dict[str, str]] = {}
    for name in arguments.plans:
        found[name] = hashes(arguments.model, PLANS[name])
        if arguments.compare:
            print(f"{name:16} {verdict(found[name], known.get(name, {}))}", flush=True)
        else:
            arguments.file.write_text(json.dumps(found, indent=2) + "\n")
            print(f"{name:16} {len(found[name])} files", flush=True)
    return int(arguments.compare and any(found[name] != known.get(name) for name in found))


def hashes(model: str, options: list[str]) -> dict[str, str]:
    """Hashes of the files that quantizing ``model`` writes, by name."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        command = [sys.executable, "-m", "quantine.cli", "quantize", model, str(out)]
        subprocess.run([*command, *CALIBRATION, *options], check=True)
        files = [*out.glob("*.safetensors"), out / "config.json"]
        result = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        report = stable(json.loads((out / "quantine_report.json").read_text()))
        plain = json.dumps(report, sort_keys=True).encode()
        return {**result, "quantine_report.json": hashlib.sha256(plain).hexdigest()}


def stable(value: Any) -> Any:
    """``value`` without what differs from run to run or from version to version."""
    if isinstance(value, dict):
        return {key: stable(item) for key, item in value.items() if key not in VARYING}
    return [stable(item) for item in value] if isinstance(value, list) else value


def verdict(found: dict[str, str], known: dict[str, str]) -> str:
    """Which files have other bytes than before."""
    other = [name for name in {**known, **found} if found.get(name) != known.get(name)]
    return f"differs in {', '.join(other)}" if other else f"the same {len(found)} files"


if __name__ == "__main__":
    sys.exit(main())
