"""Parts of the calibration text, and what was seen in each, make up the whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantine import Calibration, Plan, PlanError
from quantine.calibrate.block_loader import BlockLoader
from quantine.calibrate.sequential import Sequential
from quantine.calibrate.share import Share
from quantine.run.prepare import prepare
from quantine.statistics.channel_ranges import ChannelRanges
from quantine.statistics.hessian import Hessian


@given(st.integers(1, 40), st.integers(1, 9))
def test_shares_are_all_of_it_once(samples: int, count: int) -> None:
    segments = torch.arange(samples).view(-1, 1)
    shares = [Share(rank, count) for rank in range(count)]
    assert torch.equal(torch.cat([share.segments(segments) for share in shares]), segments)
    sizes = [len(share.segments(segments)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for number in range(samples):
        assert sum(share.owns(number) for share in shares) == 1


def test_one_process_does_everything() -> None:
    segments = torch.arange(6).view(3, 2)
    assert torch.equal(Share().segments(segments), segments)
    assert all(Share().owns(number) for number in range(5))


@pytest.mark.parametrize(("rank", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_ranks_that_are_none_are_refused(rank: int, count: int) -> None:
    with pytest.raises(PlanError, match="rank must be from 0"):
        Share(rank, count)


def test_statistics_of_shares_merge_to_those_of_the_whole(
    tiny: Callable[[str], Path], short: Calibration
) -> None:
    job = prepare(tiny("llama"), Plan.preset("gptq", bits=4, group_size=8), short)
    paths = ["mlp.down_proj", "self_attn.o_proj"]

    def seen(share: Share) -> tuple[list[Hessian], dict[str, ChannelRanges]]:
        part = replace(job, share=share)
        sequential = Sequential(part.calibration_setup(part.checkpoint()))
        with BlockLoader(job.model, job.family, part.checkpoint(), job.device) as loader:
            loader.load(0)
        layers = [job.observed(0, group) for group in job.block_groups(0)]
        return sequential.observe(0, layers), sequential.ranges(0, paths)

    whole, whole_ranges = seen(Share())
    first, first_ranges = seen(Share(0, 2))
    second, second_ranges = seen(Share(1, 2))
    for one, part, other in zip(whole, first, second, strict=True):
        part.merge(other)
        assert job.segments is not None
        assert part.tokens == one.tokens == job.segments.numel()
        torch.testing.assert_close(part.matrix, one.matrix, rtol=1e-5, atol=1e-4)
    for path in paths:
        merged = first_ranges[path]
        merged.merge(second_ranges[path])
        for field in ("lows", "highs", "firsts", "rows"):
            pair = getattr(merged, field), getattr(whole_ranges[path], field)
            torch.testing.assert_close(*pair)
        assert merged.tokens == whole_ranges[path].tokens
