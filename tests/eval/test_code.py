"""Programs of a model: what counts as passing, and what limits hold."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from quantine.eval.code import passes

PASSING = {
    "empty": "",
    "test": "def add(a, b):\n    return a + b\nassert add(2, 3) == 5",
    "loud": "print('x' * 10_000_000)",
    "main": "assert __name__ == '__main__'",
}
FAILING = {
    "assertion": "assert 1 == 2",
    "syntax": "def f(:",
    "early success": "import sys\nsys.exit(0)\nassert False",
    "early success below": "import os\nos._exit(0)",
    "guessed status": "import os\nos._exit(1)",
    "memory": "x = bytearray(3_000_000_000)",
    "file": "open('x', 'wb').write(b'0' * 10_000_000)",
    "killed": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "environment": "import os\nassert 'HOME' in os.environ",
}


@pytest.mark.parametrize("program", PASSING.values(), ids=PASSING)
def test_what_comes_to_its_end_passes(program: str) -> None:
    assert passes(program)


@pytest.mark.parametrize("program", FAILING.values(), ids=FAILING)
def test_what_does_not_fails(program: str) -> None:
    assert not passes(program)


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)"])
def test_time_is_limited(program: str) -> None:
    assert not passes(program, seconds=1)


def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])"
    assert passes(program)
    time.sleep(4)
    assert not mark.exists()
