"""Parts of the calibration text whose statistics are summed on their own, one after another.

Sums of floats depend on their order. The order is that of the shards, so that statistics have the
same bytes however many processes take them.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor


def cut(segments: Tensor, shards: int) -> list[Tensor]:
    """The shards of ``segments`` ``[samples, seqlen]``: consecutive rows, nearly as many in each.

    Args:
        segments: the segments, at least as many as shards.
        shards: number of shards.
    """
    bounds = [len(segments) * shard // shards for shard in range(shards + 1)]
    return [segments[slice(*pair)] for pair in pairwise(bounds)]


def batch_samples(samples: int, seqlen: int, batch_tokens: int, shards: int = 1) -> int:
    """Number of segments in a batch, the same in every shard of ``samples`` segments.

    The largest divisor of the sizes of all shards that keeps a batch within ``batch_tokens``
    tokens; at least 1.
    """
    sizes = {samples * (shard + 1) // shards - samples * shard // shards for shard in range(shards)}
    fitting = [
        size
        for size in range(1, min(sizes) + 1)
        if size * seqlen <= batch_tokens and all(one % size == 0 for one in sizes)
    ]
    return max(fitting, default=1)
