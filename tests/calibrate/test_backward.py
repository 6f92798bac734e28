"""Gradients taken block by block against those of the whole model at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from quantine import Calibration, Plan
from quantine.calibrate.backward import backward, draw, replace_by_gradients
from quantine.calibrate.block_loader import BlockLoader
from quantine.calibrate.hidden_states import HiddenStates
from quantine.calibrate.sequential import Sequential
from quantine.families.layers import block_list
from quantine.run.job import Job
from quantine.run.prepare import prepare
from quantine.statistics.gradients import SquaredGradients
from tiny_models import FAMILIES, with_weights

SEED = 3


def streamed(job: Job, scratch: Path) -> dict[str, Tensor]:
    """Mean squared gradients of every matrix's outputs, one block in memory at a time."""
    assert job.segments is not None
    checkpoint = job.checkpoint()
    setup = job.calibration_setup(checkpoint)
    sequential = Sequential(setup)
    loader = BlockLoader(job.model, job.family, checkpoint, job.device)
    inputs = []
    blocks = range(len(block_list(job.model, job.family)))
    for index in blocks:
        loader.load(index)
        kept = HiddenStates(len(sequential.hidden), scratch / str(index))
        for batch in range(len(sequential.hidden)):
            kept[batch] = sequential.hidden[batch]
        inputs.append(kept)
        sequential.advance(index)
        loader.release(index)

    replace_by_gradients(setup, partial(job.read, checkpoint), sequential.hidden, SEED)
    found = {}
    for index in reversed(blocks):
        loader.load(index)
        layers = [decision.layer for decision in job.block_schemes(index)]
        seen = backward(
            sequential, index, layers, inputs[index], sequential.hidden, SquaredGradients
        )
        assert {squares.tokens for squares in seen.values()} == {job.segments.numel()}
        found.update({name: squares.mean() for name, squares in seen.items()})
        loader.release(index)
    return found


def at_once(model: Any, segments: Tensor, names: list[str]) -> dict[str, Tensor]:
    """The same from one backward pass through the whole model, a segment at a time."""
    sums = {name: torch.zeros(1) for name in names}
    generator = torch.Generator().manual_seed(SEED)

    def watch(name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            sums[name] = sums[name] + gradient.square().flatten(0, -2).sum(0)

        def look(_module: object, _inputs: object, output: Tensor) -> None:
            output.register_hook(add)

        return look

    for name in names:
        model.get_submodule(name).register_forward_hook(watch(name))
    for segment in segments:
        logits = model(input_ids=segment.unsqueeze(0), use_cache=False).logits[0]
        drawn = draw(logits.detach().softmax(-1), generator)[:, 0]
        cross_entropy(logits, drawn, reduction="sum").backward()
    return {name: total / segments.numel() for name, total in sums.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_block_by_block_is_the_whole_model(
    name: str, tiny: Callable[[str], Path], short: Calibration, tmp_path: Path
) -> None:
    job = prepare(tiny(name), Plan.preset("spqr"), short)
    found = streamed(job, tmp_path)
    assert job.segments is not None
    expected = at_once(with_weights(tiny(name), {}), job.segments, list(found))
    assert len(found) == len(job.scheme_layers())
    for layer, values in found.items():
        torch.testing.assert_close(values, expected[layer], rtol=2e-3, atol=1e-7)


def test_indices_are_drawn_as_often_as_they_are_probable() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0]).expand(20_000, -1)
    drawn = draw(probabilities, torch.Generator().manual_seed(0))
    counts = drawn.flatten().bincount(minlength=6) / len(drawn)
    torch.testing.assert_close(counts, probabilities[0], atol=0.02, rtol=0)
    assert counts[[0, 3, 5]].tolist() == [0.0, 0.0, 0.0]
