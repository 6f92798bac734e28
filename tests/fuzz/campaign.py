"""Running mutants in forked workers, so that one which crashes or hangs is caught and named."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import resource
import shutil
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any, Final

import torch
import transformers

from quantine import QuantineError

LONGEST: Final = 20.0
"""Seconds after which a mutant counts as hanging."""
MEMORY: Final = 4 * 2**30
"""Bytes of addresses that a worker may take beyond what it starts with."""
LONGEST_MESSAGE: Final = 300
"""Characters that a line of an error's message may have, paths not counted."""
RAN: Final = "loaded and ran"
FORK: Final = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Target:
    """A kind of input.

    Attributes:
        name: what it is called.
        share: part of a campaign's mutants.
        build: writes what mutants are made of below a folder.
        attempt: makes a mutant with a generator of random numbers, from that folder, at a path that
            does not exist yet, and uses it. A `QuantineError` is a refusal, any other a fault.
    """

    name: str
    share: float
    build: Callable[[Path], None]
    attempt: Callable[[Random, Path, Path], None]


@dataclass(frozen=True)
class Mutant:
    """One input to be tried: of which target, from which seed."""

    target: Target
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: a word for the table, and details where it is a fault."""

    mutant: Mutant
    said: str
    fault: str = ""


def mutants(targets: Sequence[Target], count: int, seed: int) -> list[Mutant]:
    """So many mutants, shared out among ``targets``; those of a target have consecutive seeds."""
    whole = sum(target.share for target in targets)
    found = []
    for index, target in enumerate(targets):
        before = sum(t.share for t in targets[:index]) / whole
        number = round(count * (before + target.share / whole)) - round(count * before)
        found.extend(Mutant(target, seed + n) for n in range(number))
    return found


def run(
    root: Path, todo: Sequence[Mutant], workers: int, longest: float = LONGEST
) -> list[Outcome]:
    """Try every mutant.

    Args:
        root: an empty folder.
        todo: the mutants.
        workers: number of processes.
        longest: seconds after which a mutant counts as hanging.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    for target in {mutant.target.name: mutant.target for mutant in todo}.values():
        _build(target, root)
    mixed = sorted(todo, key=lambda m: Random(f"{m.target.name}{m.seed}").random())
    lanes = [mixed[number::workers] for number in range(workers)]
    started = [_Lane(root / f"worker{n}", root, lane) for n, lane in enumerate(lanes) if lane]
    while any(lane.process is not None for lane in started):
        open_lanes = [lane for lane in started if lane.process is not None]
        ready = wait([lane.results for lane in open_lanes], timeout=0.5)
        for lane in open_lanes:
            lane.step(lane.results in ready, longest)
    return [outcome for lane in started for outcome in lane.outcomes]


def _build(target: Target, root: Path) -> None:
    # In a process of its own: threads that it starts would not survive the forks of workers.
    process = FORK.Process(target=_quietly, args=(target.build, root))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"what {target.name} are made of could not be built")


def _quietly(function: Callable[..., Any], *arguments: Any) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable()
    function(*arguments)


class _Lane:
    """A worker and its share of the mutants; another process takes over where one dies."""

    def __init__(self, place: Path, root: Path, todo: Sequence[Mutant]) -> None:
        self._place, self._root, self._todo = place, root, todo
        self.outcomes: list[Outcome] = []
        self.process: Any = None
        self._start()

    def _start(self) -> None:
        self.process = None
        rest = self._todo[len(self.outcomes) :]
        if rest:
            self.results, theirs = FORK.Pipe(duplex=False)
            arguments = (_work, theirs, self._place, self._root, rest)
            self.process = FORK.Process(target=_quietly, args=arguments)
            self.process.start()
            theirs.close()
            self._since = time.monotonic()

    def step(self, ready: bool, longest: float) -> None:
        """Take one result; or see to a worker that died or hangs."""
        if ready:
            try:
                said, fault = self.results.recv()
                self.outcomes.append(Outcome(self._todo[len(self.outcomes)], said, fault))
                self._since = time.monotonic()
                return
            except EOFError:
                self.process.join()
                how = f"the process died with exit status {self.process.exitcode}"
        elif time.monotonic() - self._since < longest:
            return
        else:
            self.process.kill()
            self.process.join()
            how = f"no end after {longest:g} s"
        if len(self.outcomes) < len(self._todo):
            self.outcomes.append(Outcome(self._todo[len(self.outcomes)], "died or hung", how))
        self._start()


def _work(results: Connection, place: Path, root: Path, todo: Sequence[Mutant]) -> None:
    with contextlib.suppress(ValueError, OSError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    for mutant in todo:
        results.send(_tried(mutant, root, place))


def _tried(mutant: Mutant, root: Path, place: Path) -> tuple[str, str]:
    """The word for the table, and what is wrong."""
    shutil.rmtree(place, ignore_errors=True)
    torch.manual_seed(0)
    try:
        mutant.target.attempt(Random(f"{mutant.target.name} {mutant.seed}"), root, place)
    except QuantineError as error:
        said = str(error).replace(str(place), "P")
        name = f"refused: {type(error).__name__}"
        if max(map(len, said.split("\n"))) > LONGEST_MESSAGE or not said:
            return "message too long", f"{name} of {len(said)} characters: {said[:600]}"
        return name, ""
    except BaseException as error:  # also panics of Rust, which are no Exception
        lines = "".join(traceback.format_exception(error)).strip().splitlines()
        return type(error).__name__, "\n".join(line[:300] for line in lines[-14:])
    return RAN, ""


def table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Lines that say how many mutants of which target had which outcome."""
    names = sorted({outcome.mutant.target.name for outcome in outcomes})
    counts = Counter((outcome.mutant.target.name, outcome.said) for outcome in outcomes)
    faults = {outcome.said for outcome in outcomes if outcome.fault}
    words = sorted({said for _, said in counts}, key=lambda said: (said in faults, said))
    yield f"{'':32}" + "".join(f"{name:>13}" for name in names)
    for word in words:
        mark = " !" if word in faults else ""
        yield f"{word + mark:32}" + "".join(f"{counts[name, word]:13}" for name in names)
    yield f"{'total':32}" + "".join(
        f"{sum(n for (name, _), n in counts.items() if name == wanted):13}" for wanted in names
    )
