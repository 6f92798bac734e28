"""A thousand damaged inputs are refused by name or run, and what would be worse is noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from fuzz import campaign
from fuzz.__main__ import TARGETS
from fuzz.campaign import Mutant, Outcome, Target
from quantine import FormatError

COUNT = 1000
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the command says of its first thousand mutants."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", "--count", str(COUNT)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"{COUNT} mutants in" in done.stdout, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", TARGETS)
def test_damage_is_refused_by_name_or_runs(name: str, said: list[str]) -> None:
    faults = [index for index, line in enumerate(said) if f"-m fuzz --only {name} " in line]
    assert not faults, "\n".join(said[faults[0] : faults[0] + 20])
    column = said[0].split().index(name)
    ran = next(line for line in said if line.startswith(campaign.RAN))
    total = next(line for line in said if line.startswith("total"))
    assert int(total.split()[1 + column]) > int(ran.split()[3 + column]) > 0


def outcomes_of(
    attempt: Callable[[Random, Path, Path], None], root: Path, longest: float = 60.0
) -> list[Outcome]:
    """What becomes of two mutants, of which the second is sound."""

    def first_only(random: Random, folder: Path, place: Path) -> None:
        if random.random() == Random("t 0").random():
            attempt(random, folder, place)

    target = Target("t", 1.0, lambda _: None, first_only)
    return campaign.run(root, [Mutant(target, 0), Mutant(target, 1)], 1, longest)


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("attempt", "word", "fault"),
    [
        (lambda *_: os.kill(os.getpid(), signal.SIGKILL), "died or hung", "exit status -9"),
        (lambda *_: time.sleep(60), "died or hung", "no end after 2 s"),
        (lambda *_: {}["x"], "KeyError", "KeyError: 'x'"),
        (lambda *_: _raise(KeyboardInterrupt()), "KeyboardInterrupt", "KeyboardInterrupt"),
        (lambda *_: _raise(FormatError("y" * 400)), "message too long", "400 characters"),
        (lambda *_: bytearray(2**40), "MemoryError", "MemoryError"),
        (lambda *_: _raise(FormatError("named")), "refused: FormatError", ""),
        (lambda *_: None, campaign.RAN, ""),
    ],
)
def test_what_becomes_of_a_mutant_is_told(
    attempt: Callable[..., None], word: str, fault: str, tmp_path: Path
) -> None:
    found = {outcome.mutant.seed: outcome for outcome in outcomes_of(attempt, tmp_path, 2.0)}
    assert found[0].said == word
    assert fault in found[0].fault
    assert bool(found[0].fault) == bool(fault)
    assert found[1].said == campaign.RAN


def test_mutants_are_shared_out_and_can_be_made_again_alone() -> None:
    targets = [Target(name, share, _raise, _raise) for name, share in (("a", 0.5), ("b", 0.25))]
    made = campaign.mutants(targets, 9, 100)
    assert [(one.target.name, one.seed) for one in made] == [
        *(("a", 100 + n) for n in range(6)),
        *(("b", 100 + n) for n in range(3)),
    ]
    assert campaign.mutants(targets[:1], 1, 104) == [made[4]]
