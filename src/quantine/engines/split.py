"""Parts of a quantized matrix: the outputs, or the inputs, that one of several processes has.

A part holds the same weights as the whole, bit for bit: codes, statistics and outliers are cut, and
nothing is rounded again. That needs cuts between groups, and between runs of lines that share a
second grid.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Final, Literal

import torch
from torch import Tensor

from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import WHOLE_ROW, QuantSpec

Axis = Literal["out", "in"]
"""What is cut: the outputs of a matrix ``[out, in]``, which are its rows, or its inputs."""
MOST_PROCESSES: Final = 16
"""Largest number of processes that `counts_that_work` names."""


def refusal(
    spec: QuantSpec,
    shape: tuple[int, int],
    axis: Axis,
    bounds: tuple[int, int],
    ordered: bool = False,
) -> str | None:
    """Why the part of a matrix between ``bounds`` cannot be cut out; ``None`` if it can.

    Args:
        spec: of the matrix.
        shape: ``(out, in)`` of the whole matrix.
        axis: what is cut.
        bounds: first output or input of the part, and the one after its last.
        ordered: whether columns are stored in another order than the inputs'.
    """
    total = shape[0] if axis == "out" else shape[1]
    if bounds == (0, total):
        return None
    name = "outputs" if axis == "out" else "inputs"
    if axis == "in" and ordered:
        return (
            "its columns are stored in the order in which they were solved, not in that of inputs"
        )
    allowed = _cuts(spec, shape, axis)
    if allowed.issuperset(bounds):
        return None
    first, last = bounds
    return f"{name} {first} to {last - 1} do not begin and end {_between(spec, axis)}"


def counts_that_work(
    spec: QuantSpec, shape: tuple[int, int], axis: Axis, ordered: bool = False
) -> list[int]:
    """Numbers of equal parts, up to `MOST_PROCESSES`, into which a matrix can be cut.

    Arguments are those of `refusal`.
    """
    total = shape[0] if axis == "out" else shape[1]

    def works(count: int) -> bool:
        size = total // count
        parts = [(number * size, (number + 1) * size) for number in range(count)]
        return total % count == 0 and not any(
            refusal(spec, shape, axis, part, ordered) for part in parts
        )

    return [count for count in range(1, MOST_PROCESSES + 1) if works(count)]


def outputs_of(qtensor: QTensor, first: int, last: int) -> QTensor:
    """The outputs ``first`` to ``last - 1`` of ``qtensor``; `refusal` must have none."""
    if (first, last) == (0, len(qtensor.codes)):
        return qtensor
    kept = qtensor.outliers
    if kept is not None:
        kept = kept.rows(torch.arange(first, last, device=kept.columns.device))
    grid = qtensor.grid
    grid = _lines(grid, first, last) if grid.axis == "in" else _groups(grid, first, last)
    return replace(qtensor, codes=qtensor.codes[first:last].clone(), grid=grid, outliers=kept)


def inputs_of(qtensor: QTensor, first: int, last: int) -> QTensor:
    """The inputs ``first`` to ``last - 1`` of ``qtensor``; `refusal` must have none."""
    if (first, last) == (0, qtensor.codes.shape[1]):
        return qtensor
    assert qtensor.in_perm is None
    kept = None if qtensor.outliers is None else _columns(qtensor.outliers, first, last)
    grid = qtensor.grid
    grid = _lines(grid, first, last) if grid.axis == "out" else _groups(grid, first, last)
    return replace(qtensor, codes=qtensor.codes[:, first:last].clone(), grid=grid, outliers=kept)


def _cuts(spec: QuantSpec, shape: tuple[int, int], axis: Axis) -> set[int]:
    """Places along ``axis`` at which a part may begin or end."""
    total = shape[0] if axis == "out" else shape[1]
    along_lines = spec.group_axis == axis
    if along_lines and spec.clustered:
        return {0, *accumulate(spec.cluster_sizes)}
    if along_lines:
        step = 1 if spec.group_size == WHOLE_ROW else spec.group_size
    else:
        step = spec.stat_group_size if spec.second_level else 1
        step = 1 if step == WHOLE_ROW else step
    return {*range(0, total, step), total}


def _between(spec: QuantSpec, axis: Axis) -> str:
    if spec.group_axis == axis:
        return "between clusters" if spec.clustered else f"between groups of {spec.group_size}"
    return f"between tiles of {spec.stat_group_size}, which share second-level statistics"


def _lines(grid: Grid, first: int, last: int) -> Grid:
    """The grid of some lines, whose bounds are those of runs that share a second grid."""

    def of(stored: Tensor | Statistic) -> Tensor | Statistic:
        if isinstance(stored, Tensor):
            return stored[first:last]
        second = stored.grid
        tiles = slice(first // second.group_size, -(-last // second.group_size))
        return Statistic(stored.codes[:, first:last], _chosen(second, tiles))

    return _with(grid, of(grid.scale), None if grid.zero_point is None else of(grid.zero_point))


def _groups(grid: Grid, first: int, last: int) -> Grid:
    """The grid of the groups between two places of every line."""
    if grid.sizes:
        ends = list(accumulate(grid.sizes))
        groups = slice(ends.index(first) + 1 if first else 0, ends.index(last) + 1)
    else:
        groups = slice(first // grid.group_size, -(-last // grid.group_size))

    def of(stored: Tensor | Statistic) -> Tensor | Statistic:
        if isinstance(stored, Tensor):
            return stored[:, groups]
        second = stored.grid
        assert isinstance(second.scale, Tensor)
        assert isinstance(second.zero_point, Tensor)
        chosen = _with(second, second.scale[groups], second.zero_point[groups])
        return Statistic(stored.codes[groups], chosen)

    zero = None if grid.zero_point is None else of(grid.zero_point)
    whole = min(grid.group_size, last - first)  # a group of the whole line is as long as its part
    return replace(_with(grid, of(grid.scale), zero), sizes=grid.sizes[groups], group_size=whole)


def _chosen(second: Grid, tiles: slice) -> Grid:
    assert isinstance(second.scale, Tensor)
    assert isinstance(second.zero_point, Tensor)
    return _with(second, second.scale[:, tiles], second.zero_point[:, tiles])


def _with(grid: Grid, scale: Tensor | Statistic, zero: Tensor | Statistic | None) -> Grid:
    return replace(grid, scale=scale, zero_point=zero)


def _columns(kept: Csr, first: int, last: int) -> Csr:
    """The entries in columns ``first`` to ``last - 1``, counted from ``first``."""
    inside = (kept.columns >= first) & (kept.columns < last)
    before = torch.cat([inside.new_zeros(1, dtype=torch.int64), inside.cumsum(0)])
    shape = (kept.shape[0], last - first)
    offsets = before[kept.row_offsets]
    return Csr(offsets, kept.columns[inside] - first, kept.values[inside], shape)
