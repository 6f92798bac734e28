"""Products of rows of activations, of an expert each, with the matrices of the experts.

Which experts rows have is known on the device only, and the host waits for nothing: programs read
it, and with it only the codes of experts that have rows. A matrix of all experts is one launch, or
one for each way in which it is packed.

The meaning is `quantine.kernels.matrix.reference.multiply_grouped_reference` (``exact``), as
precise as `few_rows` or `many_rows` say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from quantine.kernels import backend
from quantine.kernels.matrix.triton import few_rows, many_rows
from quantine.kernels.matrix.triton.arrange import arrange, arrange_rows
from quantine.kernels.matrix.triton.programs import experts as programs
from quantine.kernels.matrix.triton.warps import REGISTERS
from quantine.kernels.matrix.units.activations import Arranged, Rows
from quantine.kernels.matrix.units.statistics import RowGroups
from quantine.kernels.matrix.units.unit_stack import UnitStack


def multiply_unsorted(stacks: Sequence[UnitStack], x: Tensor, experts: Tensor) -> Tensor:
    """The product of each row of ``x`` with the matrix of its expert, as `few_rows` has it.

    Codes are read again for each row, so it is for rows of which hardly two have one expert.

    Args:
        stacks: the matrices ``[out, in]`` of all experts.
        x: ``[rows, in]`` float32, float16 or bfloat16, contiguous.
        experts: ``[rows]`` int64, the number of the expert of each row.

    Returns:
        ``[rows, out]`` in the dtype of ``x``.
    """
    result = x.new_empty(len(x), stacks[0].matrices[0].rows)
    for stack in stacks:
        places, matrix = stack.places.index_select(0, experts), stack.matrices[0]
        program, operands, settings = few_launch_of(
            stack, places, arrange(x, matrix, places), result
        )
        with backend.launching(x):
            program[(triton.cdiv(matrix.rows, matrix.program), len(x))](*operands, **settings)
    return result


def multiply_sorted(stacks: Sequence[UnitStack], x: Tensor, experts: Tensor) -> Tensor:
    """As `multiply_unsorted`, by tensor cores as `many_rows` has it: rows of an expert together.

    Args:
        stacks, x: as there.
        experts: as there, in rising order.
    """
    tiles = tiles_of(experts, len(stacks[0].places))
    result = x.new_empty(len(x), stacks[0].matrices[0].rows)
    for stack in stacks:
        rows = arrange_rows(x, stack.matrices[0], stack.places.index_select(0, experts))
        program, operands, settings = many_launch_of(stack, tiles, rows, result)
        with backend.launching(x):
            grid = (triton.cdiv(stack.matrices[0].rows, many_rows.OUTPUTS), len(tiles.experts))
            program[grid](*operands, **settings)
    return result


@dataclass(frozen=True)
class Tiles:
    """Tiles of rows, each of one expert.

    Attributes:
        experts: ``[tiles]`` int64, number of the expert.
        firsts, stops: ``[tiles]`` int32, rows from the first up to and without the stop; tiles that
            are not needed have none.
        height: largest number of rows of a tile, a power of two.
    """

    experts: Tensor
    firsts: Tensor
    stops: Tensor
    height: int


def tiles_of(experts: Tensor, count: int) -> Tiles:
    """Tiles for rows that have experts ``[rows]`` int64, in rising order, of so many.

    How many tiles there are does not depend on which experts rows have.
    """
    height = many_rows.LEAST
    while height < min(many_rows.MOST, len(experts) // count):
        height *= 2
    most = len(experts) // height + min(count, len(experts))
    bounds = torch.searchsorted(experts, _numbers(count + 1, experts))
    needed = (bounds.diff() + height - 1) // height
    ends = needed.cumsum(0)
    tile = _numbers(most, experts)
    owner = torch.searchsorted(ends, tile, right=True).clamp(max=count - 1)
    starts, stops = bounds[:-1], bounds[1:]
    # Of the tiles of one expert, `tile - (ends - needed)` are before this one.
    firsts = (starts - (ends - needed) * height).index_select(0, owner) + tile * height
    return Tiles(owner, firsts.int(), stops.index_select(0, owner).int(), height)


def _numbers(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.int64, device=like.device)


def few_launch_of(
    stack: UnitStack, places: Tensor, x: Arranged, result: Tensor
) -> tuple[Any, list[Any], dict[str, Any]]:
    """The program for ``stack``, its operands in order, and what is fixed when it is compiled.

    Args:
        stack: some of the experts.
        places: ``[rows]`` int32, where the matrix of each row is in it; -1 if it is not.
        x: the rows, arranged for their matrices.
        result: what it fills.
    """
    _, operands, settings = few_rows.launch_of(stack.matrices[0], x, result, batch=1)
    if isinstance(stack.matrices[0].groups, RowGroups):
        kernel = programs.multiply_row_groups_of_experts
        settings["maxnreg"] = REGISTERS  # some would be spilled otherwise
    else:
        kernel = programs.multiply_column_groups_of_experts
    operands[-3] = stack.multipliers
    steps = _steps(stack, operands[:4])
    return kernel, [places, stack.starts, *steps, *operands], settings


def many_launch_of(
    stack: UnitStack, tiles: Tiles, x: Rows, result: Tensor
) -> tuple[Any, list[Any], dict[str, Any]]:
    """As `few_launch_of`, for rows in tiles."""
    _, operands, settings = many_rows.launch_of(stack.matrices[0], x, result)
    operands[-4:-2] = [stack.multipliers]  # how many rows there are, tiles know
    settings["BATCH"] = tiles.height
    of_tiles = [stack.places.index_select(0, tiles.experts), tiles.firsts, tiles.stops]
    steps = _steps(stack, operands[:5])
    return (
        programs.multiply_tiles_of_experts,
        [*of_tiles, stack.starts, *steps, *operands],
        settings,
    )


def _steps(stack: UnitStack, parts: Sequence[Tensor | None]) -> list[int]:
    """How far apart matrices are in memory, by part: ``parts`` of the first, and its bounds."""
    entries = stack.matrices[0].entries
    bounds = None if entries is None else entries.bounds
    return [0 if part is None else part.numel() for part in (*parts, bounds)]
