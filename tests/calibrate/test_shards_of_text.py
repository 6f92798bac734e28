"""Shards of the calibration text, and the statistics that they add up to."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from quantine.calibrate.shards import batch_samples, cut


@given(st.integers(1, 40), st.integers(1, 9))
def test_shards_are_all_of_the_text_once(samples: int, shards: int) -> None:
    segments = torch.arange(samples).view(-1, 1)
    found = cut(segments, min(shards, samples))
    assert torch.equal(torch.cat(found), segments)
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert min(map(len, found)) >= 1


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 700))
def test_batches_fill_every_shard(samples: int, shards: int, seqlen: int) -> None:
    shards = min(shards, samples)
    size = batch_samples(samples, seqlen, 2048, shards)
    sizes = {len(shard) for shard in cut(torch.zeros(samples, 1), shards)}
    assert all(one % size == 0 for one in sizes)
    assert size == 1 or size * seqlen <= 2048
    larger = range(size + 1, min(sizes) + 1)
    assert not any(all(o % n == 0 for o in sizes) and n * seqlen <= 2048 for n in larger)
