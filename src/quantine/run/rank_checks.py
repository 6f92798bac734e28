"""What ranks that share a run must have in common, and what they cannot share yet."""

from __future__ import annotations

from pathlib import Path

from quantine.errors import OutputError, PlanError
from quantine.ranks.ranks import Ranks
from quantine.run.job import Job
from quantine.run.store import stored_identity
from quantine.source.read_record import ReadRecord


def check_ranks(job: Job) -> None:
    """Check, before work starts, that the ranks of ``job`` can share it.

    Raises:
        PlanError: they cannot.
    """
    count, shards = job.ranks.count, job.calibration.shards
    if count == 1:
        return
    if job.segments is not None and shards < count:
        raise PlanError(
            f"--shards {shards} is too few for {count} ranks: give a new run --shards {count} or "
            "more, or start fewer ranks"
        )


def check_sight(ranks: Ranks, out: Path, identity: dict[str, str]) -> None:
    """Check that this rank sees the run that the first one has begun in ``out``.

    Raises:
        OutputError: it does not.
    """
    if stored_identity(out) != identity:
        raise OutputError(
            f"rank {ranks.index} does not see the run in {out}: give a directory that all machines "
            "share"
        )


def check_same_weights(job: Job, record: ReadRecord, index: int) -> None:
    """Check that all ranks have read the same weights of block ``index``.

    Args:
        job: the checked request.
        record: what this rank has read.
        index: number of the block.

    Raises:
        PlanError: they have not; names a tensor.
    """
    inside = f"{job.family.blocks}.{index}."
    job.ranks.agree(
        lambda: {name: record[name] for name in record.names() if name.startswith(inside)}
    )
