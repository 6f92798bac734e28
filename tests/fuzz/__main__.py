"""The command: ``python -m fuzz --count 10000 --seed 0``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Final

from fuzz import campaign
from fuzz.directories import DIRECTORIES
from fuzz.ggufs import GGUFS
from fuzz.plans import PLANS
from fuzz.texts import TEXTS

TARGETS: Final = {target.name: target for target in (DIRECTORIES, PLANS, TEXTS, GGUFS)}
SHOWN: Final = 10
"""Largest number of faults of a target that are shown in full."""


def main() -> int:
    """Run a campaign and print its table; the exit status is 1 if there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("--count", type=int, default=1000, help="mutants in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first mutant")
    parser.add_argument("--only", choices=TARGETS, help="one kind of input")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--keep", type=Path, help="an empty folder for the files, left there")
    asked = parser.parse_args()
    targets = [TARGETS[asked.only]] if asked.only else list(TARGETS.values())
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        root = asked.keep or Path(temporary)
        todo = campaign.mutants(targets, asked.count, asked.seed)
        outcomes = campaign.run(root, todo, asked.workers)
    for line in campaign.table(outcomes):
        sys.stdout.write(f"{line}\n")
    faults = [outcome for outcome in outcomes if outcome.fault]
    seen: Counter[str] = Counter()
    for outcome in faults:
        seen[outcome.mutant.target.name] += 1
        if seen[outcome.mutant.target.name] > SHOWN:
            continue
        again = f"--only {outcome.mutant.target.name} --seed {outcome.mutant.seed} --count 1"
        sys.stdout.write(f"\n== python -m fuzz {again}\n{outcome.fault}\n")
    seconds = time.monotonic() - started
    sys.stdout.write(f"\n{len(outcomes)} mutants in {seconds:.0f} s, {len(faults)} faults\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
