"""Two ranks against one: wall time and bytes; and runs whose ranks are killed, one after another.

    python benchmarks/ranks.py demo --repeat 3
    python benchmarks/ranks.py demo --kills 10

Both start the command line of the installed quantine, with several ranks by torchrun. Times are
the medians of runs with one and with two ranks in turn, on one thread each: with as many cores as
ranks, nothing else should run. A killed rank is a random one in a random block, and one or three
ranks go on. The exit status is 1 if any bytes differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

PLAN: Final = ["--method", "spqr", "--bits", "3", "--quiet"]
SHARDS: Final = ["--samples", "24", "--shards", "6"]


def main() -> int:
    """Print a row for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--repeat", type=int, default=3, help="runs with each number of ranks")
    parser.add_argument("--kills", type=int, default=0, help="kill ranks instead, so many times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seqlen", type=int, default=256)
    arguments = parser.parse_args()
    model = [arguments.model, "--seqlen", str(arguments.seqlen)]
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.kills:
            return killed(model, Path(scratch), arguments.kills, arguments.seed)
        return timed(model, Path(scratch), arguments.repeat)


def timed(model: list[str], scratch: Path, repeat: int) -> int:
    """Print the seconds of one rank and of two, and the ratio of their medians."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    hashes = set()
    for _ in range(repeat):
        for ranks, found in seconds.items():
            out = scratch / "out"
            shutil.rmtree(out, ignore_errors=True)
            began = time.perf_counter()
            subprocess.run(command(model, out, ranks), env=environment(), check=True)
            found.append(time.perf_counter() - began)
            hashes.add(digest(out))
    one, two = (statistics.median(found) for found in seconds.values())
    for ranks, found in seconds.items():
        print(f"{ranks} ranks: {', '.join(f'{value:.1f}' for value in found)} s")
    print(f"two ranks take {two / one:.2f} of the time of one; {len(hashes)} kinds of bytes")
    return int(len(hashes) != 1)


def killed(model: list[str], scratch: Path, kills: int, seed: int) -> int:
    """Kill a random rank of three in a random block, and go on with one or three."""
    moments, wrong, whole = random.Random(seed), 0, scratch / "whole"
    subprocess.run(command(model, whole, 3), env=environment(), check=True)
    expected = digest(whole)
    blocks = json.loads((whole / "config.json").read_text())["num_hidden_layers"]
    for number in range(kills):
        out, victim, ranks = scratch / f"killed-{number}", moments.randrange(3), (1, 3)[number % 2]
        done = moments.randrange(blocks)
        said = kill(command(model, out, 3), victim, done, out)
        subprocess.run(command(model, out, ranks, resume=True), env=environment(), check=True)
        same = digest(out) == expected
        wrong += not same
        print(f"rank {victim} killed after {done} blocks; {said}")
        print(f"    {ranks} went on: {'the same bytes' if same else 'OTHER BYTES'}", flush=True)
        shutil.rmtree(out)
    return int(wrong > 0)


def kill(arguments: list[str], victim: int, blocks: int, out: Path) -> str:
    """Start ranks, and kill one once so many blocks are on disk; returns what the others say."""
    states, parts = out / ".quantine" / "states", out / ".quantine" / "parts"
    with subprocess.Popen(
        arguments, env=environment(), stderr=subprocess.PIPE, text=True
    ) as torchrun:
        while torchrun.poll() is None and (
            not states.exists() or len(list(parts.glob("block-*.json"))) < blocks
        ):
            time.sleep(0.001)
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        ranks = {rank_of(int(child)): int(child) for child in children}
        os.kill(ranks[victim], signal.SIGKILL)
        _, errors = torchrun.communicate()
    return "; ".join(line for line in errors.splitlines() if line.startswith("quantine:"))


def rank_of(process: int) -> int:
    """The rank of a process that torchrun started, by its environment; -1 for another process."""
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    found = [value for value in variables if value.startswith(b"RANK=")]
    return int(found[0].removeprefix(b"RANK=")) if found else -1


def command(model: list[str], out: Path, ranks: int, resume: bool = False) -> list[str]:
    """The command that quantizes ``model`` with so many ranks."""
    verb = [
        "quantize",
        model[0],
        str(out),
        *model[1:],
        *PLAN,
        *SHARDS,
        *(["--resume"] if resume else []),
    ]
    if ranks == 1:
        return [sys.executable, "-m", "quantine", *verb]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*torchrun, "-m", "quantine", *verb]


def environment() -> dict[str, str]:
    """The environment of all commands: one thread for each process."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def digest(out: Path) -> str:
    """A hash of the weight files of a directory, and of its maps."""
    found = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
