"""Weights that were read ahead are those of the files, and no more than one block is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantine import Calibration, Plan
from quantine.calibrate.block_loader import BlockLoader
from quantine.core.device import CPU
from quantine.errors import CheckpointError
from quantine.run.job import Job
from quantine.run.prepare import prepare
from quantine.source.checkpoint import Checkpoint

Tiny = Callable[[str], Path]

BLOCKS = 2


class Watched(Checkpoint):
    """A checkpoint that says which blocks were read, and in which thread."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.files, job.model)
        self.reads: list[tuple[int, bool]] = []
        self.begun = threading.Event()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        named = list(names)
        number = next(int(part) for part in named[0].split(".") if part.isdigit())
        own = threading.current_thread() is threading.main_thread()
        self.reads.append((number, own))
        self.begun.set()
        return super().read(named)


class Damaged(Watched):
    """One whose second block cannot be read."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        found = super().read(names)
        if self.reads[-1][0] == 1:
            raise CheckpointError("the second block is damaged: download it again")
        return found


@pytest.fixture
def job(tiny: Tiny) -> Job:
    return prepare(tiny("llama"), Plan.preset("rtn", bits=4, group_size=32), Calibration(samples=0))


def weights(block: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in block.state_dict().items()}


def test_what_is_read_ahead_is_what_is_read_at_once(job: Job) -> None:
    found = []
    for ahead in (False, True):
        checkpoint = Watched(job)
        with BlockLoader(job.model, job.family, checkpoint, CPU) as loader:
            blocks = []
            for index in (0, 1, 1, 0):
                then = {0: 1, 1: 1}[index] if ahead and len(blocks) < BLOCKS else None
                blocks.append(weights(loader.load(index, then)))
                loader.release(index)
        found.append(blocks)
        assert [number for number, _ in checkpoint.reads] == [0, 1, 1, 0]
        assert [own for _, own in checkpoint.reads] == [True, not ahead, not ahead, True]
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert all(tensor.dtype == torch.float32 for tensor in one.values())


def test_one_block_is_read_ahead_and_no_more(job: Job) -> None:
    checkpoint = Watched(job)
    with BlockLoader(job.model, job.family, checkpoint, CPU) as loader:
        loader.load(0, then=1)
        assert checkpoint.begun.wait(10)
    assert checkpoint.reads == [(0, True), (1, False)]
    assert not any(t.name.startswith("quantine-read-ahead") for t in threading.enumerate())


def test_another_block_than_the_expected_one_can_be_loaded(job: Job) -> None:
    checkpoint = Watched(job)
    with BlockLoader(job.model, job.family, checkpoint, CPU) as loader:
        first = weights(loader.load(0, then=1))
        again = weights(loader.load(0))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_errors_of_the_thread_are_raised_where_the_block_is_needed(job: Job) -> None:
    with BlockLoader(job.model, job.family, Damaged(job), CPU) as loader:
        loader.load(0, then=1)
        with pytest.raises(CheckpointError, match=r"^the second block is damaged: download"):
            loader.load(1)


def test_weights_in_float64_are_rounded_before_they_reach_a_device(job: Job) -> None:
    class Double(Watched):
        def read(self, names: Iterable[str]) -> dict[str, Tensor]:
            return {name: tensor.double() for name, tensor in super().read(names).items()}

    with BlockLoader(job.model, job.family, Double(job), torch.device("meta")) as loader:
        block = loader.load(0)
    assert {tensor.dtype for tensor in block.state_dict().values()} == {torch.float32}
