"""Runs of quantize that are killed from outside, and resumed; a program of its own.

It imports everything once and forks a child per run, so that a run costs no start-up time. Its one
argument is a JSON file: ``command`` (arguments of quantize without OUT), ``root`` (where the output
directories go), ``kills``, ``blocks`` of the model, ``seed``, and whether hidden states are on disk
(``spills``). It writes the directories as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers

from quantine import cli
from quantine.run import residence

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


def run(
    command: list[str], out: Path, kill_after: float | None = None, with_blocks: int = 0
) -> bool:
    """Quantize in a child; whether it finished, rather than died of SIGKILL.

    The child is killed ``kill_after`` seconds after so many blocks are on disk.
    """
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = cli.main(["quantize", command[0], str(out), *command[1:], "--quiet"])
        finally:
            os._exit(status)
    if kill_after is not None:
        parts = out / ".quantine" / "parts"
        running = True
        while running and len(list(parts.glob("block-*.json"))) < with_blocks:
            time.sleep(0.0005)
            running = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"quantize failed with status {os.WEXITSTATUS(status)}")
    return True


def main() -> None:
    """Run what the request asks for."""
    request = json.loads(Path(sys.argv[1]).read_text())
    root, command = Path(request["root"]), request["command"]
    if request["spills"]:
        residence.DEFAULT_SHARE = 0.0
    moments = random.Random(request["seed"])
    # Everything that is imported late is imported now, and by no child.
    cli.main(["quantize", command[0], str(root / "warm"), *command[1:], "--quiet"])
    started = time.perf_counter()
    run(command, root / "whole")
    seconds = time.perf_counter() - started
    killed = []
    for number in range(request["kills"]):
        # Tied to the blocks on disk, so that early and late steps are hit at any machine's speed.
        with_blocks = number % (request["blocks"] + 1)
        share = moments.random() / (4 * request["blocks"])
        attempt = 0
        while True:
            out = root / f"killed-{number}-{attempt}"
            delay = share * seconds * 0.5**attempt
            if not run([*command, "--resume"], out, delay, with_blocks):
                break
            attempt += 1  # it was faster than expected: aim earlier
        state = sorted(str(p.relative_to(out)) for p in out.rglob("*")) if out.exists() else []
        run([*command, "--resume"], out)
        killed.append({"out": str(out), "found": state})
    often = root / "killed-often"
    kills = 0
    while not run([*command, "--resume"], often, kill_after=seconds * moments.uniform(0.5, 0.9)):
        kills += 1
        seconds *= 1.05  # a slower machine than before still gets to the end
    killed.append({"out": str(often), "found": [f"killed {kills} times"]})
    sys.stdout.write(json.dumps({"whole": str(root / "whole"), "killed": killed}))


if __name__ == "__main__":
    main()
