"""Running programs that a model wrote, each in a process of its own with limits.

The limits keep a bad program from taking the machine's memory, disk or time. They are no sandbox:
the program runs as the user, and can read files and reach the network.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from typing import Final

SECONDS: Final = 10
MEMORY: Final = 1_000_000_000
"""Bytes of address space."""
FILE_BYTES: Final = 1_000_000
"""Bytes of a file that it may write."""
FRAME: Final = """
import os, resource, sys
seconds, memory, file_bytes, passed = map(int, sys.argv[1:])
for kind, most in (("CPU", seconds), ("AS", memory), ("FSIZE", file_bytes), ("CORE", 0)):
    resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))
exec(compile(sys.stdin.read(), "program", "exec"), {"__name__": "__main__"})
os._exit(passed)
"""
"""Runs the program on standard input. Only one that comes to its end exits with ``passed``, which
the program does not know: leaving early counts as failing."""


def passes(program: str, seconds: int = SECONDS, memory: int = MEMORY) -> bool:
    """Whether Python runs ``program`` to its end without an error.

    Args:
        seconds: of processor time and of time, after which it is killed with all it started.
        memory: bytes of address space it may take.
    """
    passed = random.SystemRandom().randint(100, 250)
    limits = [str(value) for value in (seconds, memory, FILE_BYTES, passed)]
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", FRAME, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={"PATH": os.defpath},
            start_new_session=True,
        )
        try:
            process.communicate(program.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)
        return process.returncode == passed


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it left running in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
