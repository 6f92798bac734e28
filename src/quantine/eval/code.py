"""Running programs that a model wrote, each in a process of its own with limits.

The limits keep a bad program from taking all of the machine's memory, disk or time. They are no
sandbox: the program runs as the user, and can read files and reach the network.
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
"""Seconds, of processor time and of real time, that a program may take by default."""
MEMORY: Final = 1_000_000_000
"""Bytes of address space that a program may take by default: 1 GB."""
FILE_BYTES: Final = 1_000_000
"""Largest size in bytes of a file that a program may write."""
FRAME: Final = """
import os, resource, sys
seconds, memory, file_bytes, passed = map(int, sys.argv[1:])
for kind, most in (("CPU", seconds), ("AS", memory), ("FSIZE", file_bytes), ("CORE", 0)):
    resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))
exec(compile(sys.stdin.read(), "program", "exec"), {"__name__": "__main__"})
os._exit(passed)
"""
"""Python code that sets the limits and then runs the program it reads from standard input. Only a
program that comes to its end exits with the status ``passed``, which the program does not know:
leaving early counts as failing."""


def passes(program: str, seconds: int = SECONDS, memory: int = MEMORY) -> bool:
    """Whether Python runs ``program`` to its end without an error and within the limits.

    Args:
        program: source code in Python.
        seconds: limit of processor time and of real time, after which the program is killed with
            all processes it started.
        memory: limit of its address space in bytes.
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
            # Half of a character is an error of the program, which Python finds.
            process.communicate(program.encode(errors="surrogatepass"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)
        return process.returncode == passed


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and every other one in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
