"""A forward pass that stops and goes on: the same numbers, computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from quantine import Calibration, Plan
from quantine.calibrate.block_loader import BlockLoader
from quantine.calibrate.replay import Replay
from quantine.calibrate.sequential import Sequential
from quantine.families.layers import block_list
from quantine.run.prepare import prepare
from tiny_models import FAMILIES


class Counter(TorchFunctionMode):
    """Counts the matrix products that are really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.products += func is torch.matmul
        return func(*args, **(kwargs or {}))


class _Stopped(Exception):
    pass


def run(recording: Replay, x: Tensor, weights: list[Tensor], stop_before: int | None) -> Tensor:
    with recording:
        residual, unused = x * 2, x + 1
        assert unused.shape == x.shape
        for index, weight in enumerate(weights):
            if index == stop_before:
                recording.stop()
                raise _Stopped
            first, last = torch.matmul(x, weight).tanh().sin().chunk(2)
            x = torch.cat([last, first]).add_(residual)
        return x


def test_what_was_computed_is_not_computed_again_and_what_comes_after_sees_new_weights() -> None:
    x, weights = torch.randn(4, 8), [torch.randn(8, 8) for _ in range(3)]
    recording = Replay()
    with Counter() as counter:
        for stop in (0, 1, 2):
            with pytest.raises(_Stopped):
                run(recording, x, weights, stop)
            weights[stop] = weights[stop] * 3
        result = run(recording, x, weights, None)
    assert counter.products == 3
    assert torch.equal(result, run(Replay(), x, weights, None))


def test_what_runs_while_a_stop_is_left_is_not_recorded() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    recording = Replay()

    def forward(stops: int) -> Tensor:
        with recording, torch.enable_grad():
            for number in range(3):
                if number == stops:
                    recording.stop()
                    raise _Stopped
                x.matmul(weight)
            return x.sin().cos()

    for stops in range(3):
        with pytest.raises(_Stopped):
            forward(stops)
    assert torch.equal(forward(3), x.sin().cos())


def test_only_what_is_still_used_is_kept() -> None:
    x, weights = torch.randn(4, 8), [torch.randn(8, 8) for _ in range(2)]
    recording = Replay()
    for stop in (0, 1):
        with pytest.raises(_Stopped):
            run(recording, x, weights, stop)
    kept = {
        func.__name__
        for func, value in recording._calls
        if isinstance(value, Tensor) and value.numel()
    }
    # `matmul` and `tanh` are gone; `sin` is what the two halves are views of.
    assert kept == {"mul", "add", "sin", "cat", "add_"}


class Root(torch.autograd.Function):
    """A function of autograd's, which PyTorch would have return a view of an own input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sqrt(x)


def test_results_that_are_gone_stay_apart() -> None:
    recording, x = Replay(), torch.rand(4)
    for stops in (True, False):
        with recording:
            found = 1 + Root.apply(x + 1)
            if stops:
                recording.stop()
    assert torch.equal(found, 1 + (x + 1).sqrt())


def test_a_computation_that_does_not_repeat_itself_is_refused() -> None:
    recording = Replay()
    with recording:
        torch.ones(2).sum()
        recording.stop()
    with pytest.raises(RuntimeError, match="when it ran before"), recording:
        torch.ones(2).mean()


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_that_go_on_equal_blocks_that_start_again(
    name: str, bfloat16: bool, tiny: Callable[[str], Path], short: Calibration
) -> None:
    """Every matrix is changed after its group's inputs have been observed, as quantizing does."""
    found = {}
    for resumes in (False, True):
        job = prepare(tiny(name), Plan.preset("gptq", bits=4, group_size=8), short)
        assert job.segments is not None
        setup = job.calibration_setup(job.checkpoint(), resumes=resumes)
        sequential = Sequential(replace(setup, bfloat16=bfloat16))
        loader = BlockLoader(job.model, job.family, setup.checkpoint, job.device)
        tensors = []
        for index in range(len(block_list(job.model, job.family))):
            block = loader.load(index)
            for group, paths in enumerate(job.family.groups_in(index)):
                observed = job.observed(index, group)
                tensors.append(sequential.observe_next(index, [observed])[0].matrix)
                for path in paths:
                    block.get_submodule(path).weight.data.mul_(0.9)
            sequential.advance(index)
            loader.release(index)
        tensors += [sequential.hidden[batch] for batch in range(len(sequential.hidden))]
        found[resumes] = tensors
    assert all(torch.equal(*pair) for pair in zip(found[False], found[True], strict=True))
