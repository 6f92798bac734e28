"""What it costs to go on with a run that was killed, in seconds and in blocks.

    python benchmarks/resume.py ./Qwen2.5-Coder-0.5B --after 20
    python benchmarks/resume.py demo --after 20 --moved

A run of the installed quantine is killed once so many blocks are committed, and goes on, with
``--moved`` from another directory. What is left of the time until the next block is committed, a
block's own time taken away, is what going on costs. Processor seconds are given, too, as other
programs count in the others: the exit status is 1 if going on costs more of them than a block, or
if the bytes are not those of a run that nothing stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from ranks import digest

PLAN: Final = ["--method", "spqr", "--bits", "3", "--quiet"]


def main() -> int:
    """Print the seconds of a block, and those of going on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--after", type=int, default=20, help="blocks that are done by then")
    parser.add_argument("--moved", action="store_true", help="go on from another directory")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers, too")
    arguments = parser.parse_args()
    more = [*PLAN, "--samples", str(arguments.samples)]
    with tempfile.TemporaryDirectory() as scratch:
        whole, out = Path(scratch) / "whole", Path(scratch) / "out"
        subprocess.run(command(arguments.model, whole, more), check=True)
        began = started(command(arguments.model, out, more))
        until(began, out, arguments.after)
        began.send_signal(signal.SIGKILL)
        began.wait()
        if arguments.moved:
            out = out.rename(Path(scratch) / "moved")
        again, start = (
            started(command(arguments.model, out, [*more, "--resume"])),
            time.perf_counter(),
        )
        until(again, out, arguments.after + 1)
        next_at = {
            "seconds": time.perf_counter() - start,
            "processor_seconds": processor_seconds(again.pid),
        }
        if again.wait() != 0:
            return 1
        block, same = medians_of_a_block(whole), digest(whole) == digest(out)
    costs = {name: next_at[name] - block[name] for name in block}
    for name in block:
        print(
            f"{name.replace('_', ' ')}: {block[name]:.1f} a block; the next one is committed at "
            f"{next_at[name]:.1f}; going on costs {costs[name]:.1f}"
        )
    print(f"{'the same' if same else 'OTHER'} bytes")
    if arguments.json is not None:
        found = {
            "model": Path(arguments.model).name,
            "after_blocks": arguments.after,
            "moved": arguments.moved,
            "samples": arguments.samples,
            "block": block,
            "next_block_committed_at": next_at,
            "going_on_costs": costs,
            "same_bytes": same,
        }
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(costs["processor_seconds"] > block["processor_seconds"] or not same)


def command(model: str, out: Path, more: list[str]) -> list[str]:
    """The command that quantizes ``model``."""
    return [sys.executable, "-m", "quantine", "quantize", model, str(out), *more]


def started(arguments: list[str]) -> subprocess.Popen[bytes]:
    """A process that runs a command."""
    return subprocess.Popen(arguments, env=dict(os.environ))


def until(run: subprocess.Popen[bytes], out: Path, blocks: int) -> None:
    """Wait until so many blocks are committed, or the run ends."""
    parts = out / ".quantine" / "parts"
    while run.poll() is None and len(list(parts.glob("block-*.json"))) < blocks:
        time.sleep(0.01)


def processor_seconds(process: int) -> float:
    """What a process that runs has taken of the processors, all of its threads together."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def medians_of_a_block(out: Path) -> dict[str, float]:
    """The median times of a block of a finished run."""
    blocks = json.loads((out / "quantine_report.json").read_text())["run"]["blocks"]
    names = ("seconds", "processor_seconds")
    return {name: statistics.median(block[name] for block in blocks) for name in names}


if __name__ == "__main__":
    sys.exit(main())
