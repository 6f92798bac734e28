"""Products of experts on GPUs, in Triton's interpreter, against the PyTorch reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_device import DEVICE, EXAMPLES, moved
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_matrix import ZEROS, axes, qtensor_of
from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.spec import GroupAxis
from quantine.kernels.matrix import TILED_ROWS, experts_product
from quantine.kernels.matrix.reference import multiply_grouped_reference
from quantine.kernels.matrix.units.unit_matrix import UnitMatrix, unit_matrix
from quantine.kernels.matrix.units.unit_stack import UnitStack, stacked

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from test_triton_matrix import (
    FEW_TOLERANCE,
    MANY_TOLERANCE,
    activations,
    assert_close,
)

from quantine.kernels.matrix.triton import arrange as arranging
from quantine.kernels.matrix.triton.experts import multiply_sorted, tiles_of

Kind = tuple[GroupAxis, int, int, int, str, str, float, bool]
"""Axis, lines, groups, size of a group, statistics, outliers, whether inputs have an order."""
sizes = {"in": st.sampled_from([16, 48, 64, 128]), "out": st.sampled_from([4, 8, 16])}


def kinds_of(axis: GroupAxis) -> st.SearchStrategy[Kind]:
    lines = st.integers(1, 5) if axis == "in" else st.integers(1, 12)
    return st.tuples(
        st.just(axis),
        lines,
        st.integers(1, 2),
        sizes[axis],
        st.sampled_from(["half", "coded"]),
        st.sampled_from(ZEROS),
        st.sampled_from([0.0, 0.1]),
        st.booleans(),
    )


def some_experts(kind: Kind, widths: list[int], seed: int) -> list[QTensor]:
    """An expert for each of ``widths`` in bits."""
    axis, lines, groups, size, scale, zero, outliers, ordered = kind
    return [
        qtensor_of(seed + n, lines, groups, size, bits, scale, zero, outliers, ordered, axis)
        for n, bits in enumerate(widths)
    ]


def stacks_of(experts: list[QTensor]) -> list[UnitStack]:
    matrices = [unit_matrix(moved(q)) for q in experts]
    return stacked([matrix for matrix in matrices if isinstance(matrix, UnitMatrix)])


def check(experts: list[QTensor], numbers: Tensor, x: Tensor, ordered: bool) -> None:
    """Compare each row with its expert's reference."""
    found = experts_product(stacks_of(experts), x, numbers.to(DEVICE), ordered)
    assert found.dtype == x.dtype
    assert found.shape == (len(x), len(experts[0].codes))
    # What is rounded to bfloat16 at the end is as precise as that is.
    tolerance = MANY_TOLERANCE if ordered else FEW_TOLERANCE
    tolerance += torch.finfo(x.dtype).eps
    for number, q in enumerate(experts):
        mine = (numbers == number).to(DEVICE)
        assert_close(found[mine].float(), q, x[mine].float(), tolerance)


drawn = {
    "widths": st.lists(st.integers(2, 8), min_size=1, max_size=3),
    "chosen": st.lists(st.integers(0, 99), min_size=1, max_size=3),
    "seed": st.integers(0, 2**16),
    "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
}


def check_drawn(
    kind: Kind, widths: list[int], chosen: list[int], seed: int, dtype: torch.dtype, ordered: bool
) -> None:
    numbers = torch.tensor([number % len(widths) for number in chosen])
    experts = some_experts(kind, widths, seed)
    x = activations(seed, len(chosen), experts[0].codes.shape[1], 1.0).to(dtype)
    check(experts, numbers.sort().values if ordered else numbers, x, ordered)


# Each of the programs has 60 examples of its own: groups along inputs, along outputs, and tiles.
@settings(max_examples=EXAMPLES)
@given(kind=kinds_of("in"), **drawn)
@example(("in", 3, 2, 32, "half", "whole", 0.1, True), [3, 3, 3], [1, 1], 0, torch.float16)
def test_each_row_meets_the_matrix_of_its_expert(
    kind: Kind, widths: list[int], chosen: list[int], seed: int, dtype: torch.dtype
) -> None:
    check_drawn(kind, widths, chosen, seed, dtype, ordered=False)


@settings(max_examples=EXAMPLES)
@given(
    kind=kinds_of("out"),
    **(drawn | {"chosen": st.lists(st.integers(0, 99), min_size=1, max_size=2)}),
)
@example(("out", 9, 1, 3, "half", "coded", 0.1, True), [7, 3], [0, 1], 0, torch.float16)
def test_each_row_meets_its_matrix_along_outputs(
    kind: Kind, widths: list[int], chosen: list[int], seed: int, dtype: torch.dtype
) -> None:
    check_drawn(kind, widths, chosen, seed, dtype, ordered=False)


@settings(max_examples=EXAMPLES)
@given(kind=axes.flatmap(kinds_of), **drawn)
@example(("out", 5, 2, 16, "half", "whole", 0.1, True), [4, 4, 4], [2] * 37, 0, torch.float16)
def test_rows_of_an_expert_together(
    kind: Kind, widths: list[int], chosen: list[int], seed: int, dtype: torch.dtype
) -> None:
    check_drawn(kind, widths, chosen, seed, dtype, ordered=True)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("size", [1e-30, 6e4, 1e30])
def test_activations_and_weights_of_any_size(size: float, ordered: bool) -> None:
    experts = some_experts(("in", 4, 2, 32, "half", "whole", 0.1, True), [4, 4], 3)
    kept = experts[1].outliers
    assert kept is not None
    tiny = replace(kept, values=kept.values.float() * 2.0**-40)
    experts[1] = replace(experts[1], grid=replace(experts[1].grid, exponent=-40), outliers=tiny)
    x, numbers = activations(2, 3, 64, size), torch.tensor([0, 1, 1], device=DEVICE)
    found = experts_product(stacks_of(experts), x, numbers, ordered).cpu()
    expected = multiply_grouped_reference([[q] for q in experts], x.cpu(), [1, 2], "exact")[0]
    error = (found - expected).abs().amax(1)
    assert bool((error <= FEW_TOLERANCE * expected.abs().amax(1)).all())


@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy, in the interpreter
@pytest.mark.parametrize("ordered", [False, True])
def test_what_is_not_finite_stays_in_its_row(ordered: bool) -> None:
    experts = some_experts(("in", 4, 2, 32, "half", "whole", 0.0, False), [4, 4], 3)
    x, numbers = activations(2, 3, 64, 1.0), torch.tensor([0, 0, 1], device=DEVICE)
    x[1, 5] = torch.nan
    found = experts_product(stacks_of(experts), x, numbers, ordered)
    assert [bool(row.isfinite().all()) for row in found] == [True, False, True]


def test_alike_matrices_share_memory_and_one_stack() -> None:
    experts = some_experts(("in", 4, 2, 32, "half", "whole", 0.1, True), [3, 4, 3], 3)
    one, other = stacks_of(experts)
    assert (one.numbers, other.numbers) == ((0, 2), (1,))
    assert one.places.tolist() == [0, -1, 1]
    first, second = (matrix.words for matrix in one.matrices)
    assert second.data_ptr() == first.data_ptr() + first.nbytes
    for number, matrix in zip(one.numbers, one.matrices, strict=True):
        expected = unit_matrix(moved(experts[number]))
        assert expected is not None
        for part, wanted in zip(matrix.parts()[0], expected.parts()[0], strict=True):
            if part is None or wanted is None:
                assert part is wanted
            else:
                assert torch.equal(part, wanted)


class Launches:
    """Stands for programs, and notes how many of them a launch would run, by axis."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *_, **__: None


def test_the_longest_text_of_many_experts_can_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    # CUDA refuses more than 65535 programs along the second and the third axis.
    launches = Launches()
    monkeypatch.setattr(arranging.arrangement, "arrange", launches)
    monkeypatch.setattr(arranging.experts, "arrange_for_experts", launches)
    monkeypatch.setattr(arranging.experts, "multiply_tiles_of_experts", launches)
    for ordered in (False, True):
        kind: Kind = ("in", 2, 1, 16, "half", "whole", 0.0, ordered)
        stacks = stacks_of(some_experts(kind, [4], 0) * 512)
        numbers = torch.arange(512, device=DEVICE).repeat_interleave(TILED_ROWS)
        multiply_sorted(stacks, torch.ones(len(numbers), 16, device=DEVICE), numbers)
    assert len(launches.grids) == 4
    assert max(grid[0] for grid in launches.grids) > 2**16
    assert all(max(grid[1:]) < 2**16 for grid in launches.grids)


@given(st.lists(st.sampled_from([0, 0, 1, 15, 16, 17, 100]), min_size=1, max_size=6))
def test_tiles_have_each_row_once_and_one_expert(counts: list[int]) -> None:
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    if not len(experts):
        return
    tiles = tiles_of(experts, len(counts))
    seen = []
    for number, first, stop in zip(tiles.experts, tiles.firsts, tiles.stops, strict=True):
        rows = range(int(first), int(stop))
        seen += rows[: tiles.height]
        assert all(experts[row] == number for row in rows)
    assert sorted(seen) == list(range(len(experts)))
