"""What ranks do together, where there is one of them; and how work is dealt out among several."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantine import PlanError
from quantine.ranks.ranks import ALONE, Ranks
from quantine.ranks.start import started


def rank(index: int, count: int) -> Ranks:
    """One of several, which tell each other nothing."""
    ranks = Ranks()
    ranks.index, ranks.count = index, count
    return ranks


@given(st.integers(0, 40), st.integers(1, 9))
def test_work_is_dealt_out_once(pieces: int, count: int) -> None:
    every = [rank(index, count) for index in range(count)]
    assert [number for one in every for number in one.share(pieces)] == list(range(pieces))
    sizes = [len(one.share(pieces)) for one in every]
    assert max(sizes) - min(sizes) <= 1
    owners = [every[0].owner(number) for number in range(pieces)]
    assert owners == [number % count for number in range(pieces)]


def test_sums_are_added_in_order() -> None:
    # In float32, 1 is lost beside 2**25: another order has another sum.
    parts = [[torch.tensor([value])] for value in (2.0**25, 1.0, 1.0, -(2.0**25))]
    assert ALONE.total(iter(parts))[0].item() == 0.0


def test_facts_that_differ_are_named() -> None:
    class Two(Ranks):
        def gather(self, value: object) -> list[object]:  # type: ignore[override]
            return [{"threads": "1", "plan": "a"}, value]

    ranks = Two()
    ranks.index, ranks.count = 1, 2
    ranks.agree(lambda: {"plan": "a", "threads": "1"})
    with pytest.raises(PlanError, match="ranks 1 and 0 have another threads, weights: give all"):
        ranks.agree(lambda: {"plan": "a", "threads": "2", "weights": "b"})


def test_a_process_that_torchrun_did_not_start_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with started("cpu") as (ranks, device):
        assert (ranks, device) == (ALONE, "cpu")


@pytest.mark.parametrize("value", ["two", "0", "-1"])
def test_a_number_of_ranks_that_is_none_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    with (
        pytest.raises(PlanError, match=r"WORLD_SIZE is '.*', not a number of ranks"),
        started("cpu"),
    ):
        pass


def test_ranks_that_nothing_connects_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(PlanError, match="WORLD_SIZE is set, but not all that connects ranks"),
        started("cpu"),
    ):
        pass


def test_the_module_is_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quantine", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("quantine ")
