"""The pool of threads: every task is done once, whoever does it, and nobody waits for ever."""

from __future__ import annotations

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
