"""The pool of threads: every task is done once, whoever does it, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from extension import native

PART = 2**16
"""Words that a thread reads at once: one task."""
WORDS = torch.arange(9 * PART + 5, dtype=torch.int64)
SUM = int(WORDS.sum())


@pytest.mark.parametrize("threads", [1, 2, 3, 12])
def test_every_task_is_done_once(threads: int) -> None:
    pool = native().Pool(threads)
    for count in (0, 1, PART, PART + 1, 3 * PART, len(WORDS)):
        some = WORDS[:count]
        assert native().read_words(some, pool) == int(some.sum())


def test_threads_that_fell_asleep_are_woken_and_those_awake_go_on() -> None:
    pool = native().Pool(4)
    for turn in range(200):
        if turn % 20 == 0:
            time.sleep(0.002)  # longer than threads look for work
        assert native().read_words(WORDS, pool) == SUM


def test_callers_take_turns() -> None:
    pool = native().Pool(3)
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda _: native().read_words(WORDS, pool), range(200)))
    assert set(found) == {SUM}


def test_a_pool_ends_while_its_threads_look_for_work_or_sleep() -> None:
    for pause in (0.0, 0.001):
        for _ in range(10):
            pool = native().Pool(5)
            assert native().read_words(WORDS, pool) == SUM
            time.sleep(pause)
            del pool


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (11, 11), (0, 11), (5, 8)])
def test_what_a_task_throws_reaches_the_caller_and_the_pool_goes_on(
    threads: int, first: int, last: int
) -> None:
    pool = native().Pool(threads)
    for _ in range(50):
        with pytest.raises(RuntimeError, match="a task failed"):
            native().fail(12, first, last, pool)
        assert native().read_words(WORDS, pool) == SUM


FORKED = """
import os, sys
import torch
from quantine.kernels import backend
from quantine.kernels.threads import pool

native = backend.native()
words = torch.arange(9 * 2**16, dtype=torch.int64)
own, total = native.Pool(3), int(words.sum())
assert native.read_words(words, own) == native.read_words(words, pool()) == total
child = os.fork()
if child == 0:
    assert native.read_words(words, own) == native.read_words(words, pool()) == total
    del own
    sys.exit(0)  # which also destroys the pool that the parent's models share
sys.exit(os.waitpid(child, 0)[1])
"""


def test_a_forked_process_computes_with_pools_of_its_parent_and_ends() -> None:
    native()  # skips without the extension
    program = [sys.executable, "-c", FORKED]
    # Not by `set_num_threads`, after which PyTorch's own pool keeps a child from ending.
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    with subprocess.Popen(program, start_new_session=True, env=environment) as parent:
        try:
            assert parent.wait(60) == 0
        finally:
            if parent.poll() is None:
                os.killpg(parent.pid, signal.SIGKILL)
