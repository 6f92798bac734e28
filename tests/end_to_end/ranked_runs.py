"""Runs of the command line by several ranks; a program of its own, which stands for torchrun.

It imports everything once and forks a child for each rank, so that a run costs no start-up time.
Its one argument is a JSON file with a list of runs: ``ranks``, ``command`` (arguments of quantine),
and what befalls them: ``kill`` is the number of a rank that is killed once ``parts`` blocks are in
``out``; ``error`` is raised by rank 1 when hidden states pass its second block; ``stop`` is the
number of a rank that is stopped there, and hangs. It writes, for each run, the exit status of each
rank and what all of them said on standard error, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers

from quantine import cli
from quantine.calibrate.sequential import Sequential
from quantine.ranks import pulse, start, torch_ranks  # noqa: F401 - before children fork

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

ERRORS = {"memory": MemoryError("cannot allocate memory"), "bug": ValueError("a bug")}


def befall(rank: int, run: dict[str, Any]) -> None:
    """Let this process fail as ``run`` asks for."""
    advance = Sequential.advance

    def failing(self: Sequential, index: int) -> None:
        if index == 1 and rank == run.get("stop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if index == 1 and rank == 1 and "error" in run:
            raise ERRORS[run["error"]]
        advance(self, index)

    mock.patch.object(Sequential, "advance", failing).start()
    pulse.BEAT = 0.2
    if "stop" in run:
        pulse.SILENCE = 20


def started(rank: int, run: dict[str, Any], port: int, errors: int) -> int:
    """Fork the child of a rank; returns its process number."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.dup2(errors, 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - to its end
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(run["ranks"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        befall(rank, run)
        status = cli.main(run["command"])
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException as error:
        sys.stderr.write(f"{error!r}\n")
        status = 1
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(children: list[int]) -> Iterator[tuple[int, int]]:
    """Rank and exit status of each child as it ends; the first failure ends all, as in torchrun."""
    left = dict(enumerate(children))
    told = False
    while left:
        for rank, child in list(left.items()):
            found, status = os.waitpid(child, os.WNOHANG)
            if not found:
                continue
            del left[rank]
            status = os.waitstatus_to_exitcode(status)
            yield rank, status
            if status and not told:
                told = True
                for other in left.values():
                    os.kill(other, signal.SIGTERM)
        time.sleep(0.005)


def carried_out(run: dict[str, Any]) -> dict[str, Any]:
    """Let the ranks of ``run`` do it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as errors:
        children = [started(rank, run, port, errors.fileno()) for rank in range(run["ranks"])]
        # The store of the agent, made after the forks: no child has a copy of its thread.
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        if "kill" in run:
            parts = Path(run["out"]) / ".quantine" / "parts"
            victim = children[run["kill"]]
            running = True
            while running and len(list(parts.glob("block-*.json"))) < run["parts"]:
                time.sleep(0.0005)
                running = os.waitid(os.P_PID, victim, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            os.kill(victim, signal.SIGKILL)
        statuses = dict(ended_unless_stopped(children, run))
        errors.seek(0)
        said = errors.read()
    del store
    return {"statuses": [statuses[rank] for rank in sorted(statuses)], "said": said}


def ended_unless_stopped(children: list[int], run: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """As `ended`; a stopped rank, which nobody ends, is killed once the others have."""
    if "stop" not in run:
        yield from ended(children)
        return
    others = [child for rank, child in enumerate(children) if rank != run["stop"]]
    for child in others:
        _, status = os.waitpid(child, 0)
        yield children.index(child), os.waitstatus_to_exitcode(status)
    with contextlib.suppress(ProcessLookupError):
        os.kill(children[run["stop"]], signal.SIGKILL)
    os.waitpid(children[run["stop"]], 0)
    yield run["stop"], -signal.SIGKILL


def main() -> None:
    """Run what the request asks for."""
    runs = json.loads(Path(sys.argv[1]).read_text())
    # Everything that is imported late is imported now, and by no child.
    if runs["warm"]:
        cli.main(runs["warm"])
    sys.stdout.write(json.dumps([carried_out(run) for run in runs["runs"]]))


if __name__ == "__main__":
    main()
