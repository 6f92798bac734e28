"""Which outputs and inputs of its matrices a layer of one process has, in tensor parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantine.engines.split import Axis, counts_that_work, refusal
from quantine.engines.vllm.stored import StoredMatrix
from quantine.errors import PlanError


@dataclass(frozen=True)
class Process:
    """One of the processes among which layers are cut.

    Attributes:
        rank: its number.
        count: how many there are.
    """

    rank: int
    count: int


@dataclass(frozen=True)
class Share:
    """A part of a matrix.

    Attributes:
        matrix: its number among the matrices of the layer.
        outputs: its first output in the whole matrix, and the one after its last.
        inputs: likewise.
    """

    matrix: int
    outputs: tuple[int, int]
    inputs: tuple[int, int]


def bounds(total: int, size: int, process: Process) -> tuple[int, int]:
    """First output, or input, of ``process``, and the one after its last.

    Where there are fewer parts than processes (heads of keys, or a layer that is not cut), several
    neighbours have the same part.

    Args:
        total: outputs of the whole matrix.
        size: outputs that each process has.
        process: the process.
    """
    part = process.rank * total // (process.count * size)
    return part * size, (part + 1) * size


def shares(
    matrices: Sequence[StoredMatrix],
    parts: Sequence[int],
    inputs: int,
    process: Process,
    heads: tuple[int, int] | None = None,
) -> list[Share]:
    """The parts of its matrices that a layer of ``process`` has, in the order of its outputs.

    Args:
        matrices: one for each of ``parts``, or a single one that holds them all.
        parts: outputs of each of the layer's matrices in this process.
        inputs: inputs of the layer in this process.
        process: the process.
        heads: heads of queries, and of keys, in the whole model, for a layer of queries, keys and
            values; ``None`` for others.

    Raises:
        PlanError: a matrix cannot be cut there; the message names numbers of processes that work.
    """
    if len(matrices) == 1 and len(parts) > 1:
        found = _of_one(matrices[0], parts, inputs, process, heads)
    else:
        found = [
            Share(
                number,
                bounds(matrix.shape[0], parts[number], process),
                bounds(matrix.shape[1], inputs, process),
            )
            for number, matrix in enumerate(matrices)
        ]
    for share in found:
        check_share(matrices[share.matrix], share)
    return found


def _of_one(
    matrix: StoredMatrix,
    parts: Sequence[int],
    inputs: int,
    process: Process,
    heads: tuple[int, int] | None,
) -> list[Share]:
    across = bounds(matrix.shape[1], inputs, process)
    if process.count == 1 or sum(parts) == matrix.shape[0]:
        return [Share(0, (0, matrix.shape[0]), across)]
    totals = [part * process.count for part in parts]
    if heads is not None:  # several processes may have the same head of keys
        width = totals[0] // heads[0]
        totals = [totals[0], heads[1] * width, heads[1] * width]
    found, before = [], 0
    for part, total in zip(parts, totals, strict=True):
        first, last = bounds(total, part, process)
        found.append(Share(0, (before + first, before + last), across))
        before += total
    return found


def interleaved_order(heads: int, key_heads: int, width: int) -> Tensor:
    """The order that parts queries, keys and values of a matrix that has them head by head.

    Such a matrix has, for each head of keys, its heads of queries, then the key, then the value.

    Args:
        heads, key_heads: numbers of heads of queries, and of keys.
        width: outputs of a head.

    Returns:
        ``[outputs]`` int64: place ``j`` gets output ``order[j]``.
    """
    together = heads // key_heads
    rows = torch.arange(key_heads * (together + 2) * width, device="cpu")
    rows = rows.view(key_heads, together + 2, width)
    parts = (rows[:, :together], rows[:, together], rows[:, together + 1])
    return torch.cat([part.flatten() for part in parts])


def check_share(matrix: StoredMatrix, share: Share) -> None:
    """Refuse a part that cannot be cut out of ``matrix``.

    Raises:
        PlanError: the message names numbers of processes that work.
    """
    if matrix.spec is None:
        return
    ways: tuple[tuple[Axis, tuple[int, int]], ...] = (("out", share.outputs), ("in", share.inputs))
    for axis, place in ways:
        why = refusal(matrix.spec, matrix.shape, axis, place, matrix.stores_order)
        if why is not None:
            works = counts_that_work(matrix.spec, matrix.shape, axis, matrix.stores_order)
            raise PlanError(
                f"{matrix.name} cannot be cut for this tensor_parallel_size: {why}. It can be cut "
                f"into {', '.join(map(str, works))}"
            )
