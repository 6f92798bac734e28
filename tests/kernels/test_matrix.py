"""Products with packed matrices: every instruction set against the PyTorch reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from extension import native
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from quantine.core.arithmetic import ARITHMETICS, Arithmetic
from quantine.core.grid import Grid, Statistic
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import GROUP_AXES, GroupAxis
from quantine.kernels.matrix import float_matrix, multiply, multiply_panels, packed_matrix
from quantine.kernels.matrix.reference import has_exact_zero, multiply_reference
from quantine.kernels.threads import pool

STATISTICS = ("half", "coded", "coded by two tiles", "coded across tiles", "coded whole")
arithmetics = st.sampled_from(ARITHMETICS)
axes = st.sampled_from(GROUP_AXES)
ZEROS = ("middle", "whole", "half", "coded")


def statistic(generator: torch.Generator, lines: int, groups: int, kind: str) -> Tensor | Statistic:
    if kind == "half":
        values = torch.rand(lines, groups, generator=generator) * 0.05 + 1e-4
        return values.half()
    bits = int(torch.randint(2, 9, (), generator=generator))
    span = {"coded": 16, "coded by two tiles": 32, "coded across tiles": 10, "coded whole": lines}[
        kind
    ]
    codes = torch.randint(0, 2**bits, (groups, lines), generator=generator, dtype=torch.uint8)
    tiles = math.ceil(lines / span)
    step = (torch.rand(groups, tiles, generator=generator) * 0.02).half()
    zero = torch.randn(groups, tiles, generator=generator).half()
    return Statistic(codes, Grid(step, zero, bits, span))


def qtensor_of(
    seed: int,
    lines: int,
    groups: int,
    group_size: int,
    bits: int,
    scale: str,
    zero: str,
    outliers: float,
    ordered: bool,
    axis: GroupAxis = "in",
) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    length = groups * group_size
    rows, columns = (lines, length) if axis == "in" else (length, lines)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    points: Tensor | Statistic | None = None
    if zero == "whole":
        points = torch.randint(0, 2**bits, (lines, groups), generator=generator, dtype=torch.uint8)
    elif zero == "half":
        points = (torch.rand(lines, groups, generator=generator) * 2**bits).half()
    elif zero == "coded":
        points = statistic(generator, lines, groups, "coded")
    kept = None
    if outliers:
        mask = torch.rand(rows, columns, generator=generator) < outliers
        mask[-1, 0] = True
        mask[rows // 2] = False  # an empty row among others
        mask[0] = True  # and a full one
        kept = Csr.where(mask, torch.randn(rows, columns, generator=generator))
    order = torch.randperm(columns, generator=generator) if ordered else None
    grid = Grid(statistic(generator, lines, groups, scale), points, bits, group_size, axis)
    return QTensor(codes, grid, order, kept)


def reach(q: QTensor) -> Tensor:
    """How large the parts of each weight are that sums are made of, ``[out, in]``."""
    size, codes, middle = q.grid.group_size, q.codes.float(), 2 ** (q.grid.bits - 1)
    scale, zero = (s.repeat_interleave(size, 1) for s in (q.grid.scales(), q.grid.zeros()))
    stored = codes + (zero if q.grid.axis == "in" else zero.T).abs()
    if q.grid.axis == "out":  # exact sums are taken from the middle code, and zero points with them
        scale = scale.T
        stored = torch.maximum(stored, (codes - middle).abs() + (zero.T - middle).abs())
    stored *= scale.abs()
    if q.outliers is not None:
        places = q.outliers.row_indices(), q.outliers.columns
        stored[places] += q.outliers.values.float().abs()
    return stored if q.in_perm is None else stored[:, q.in_perm.argsort()]


def close(found: Tensor, expected: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Within 1e-5 of what the sums could reach."""
    size = x.abs() @ weight.abs().T
    return bool(((found - expected).abs() <= 1e-5 * size + 1e-30).all())


kinds = {
    "seed": st.integers(0, 2**16),
    "bits": st.integers(2, 8),
    "scale": st.sampled_from(STATISTICS),
    "zero": st.sampled_from(ZEROS),
    "outliers": st.sampled_from([0.0, 0.01, 0.3]),
    "ordered": st.booleans(),
}
along_inputs = st.builds(
    qtensor_of,
    lines=st.integers(1, 50),
    groups=st.integers(1, 5),
    group_size=st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 128, 200])),
    **kinds,
)
widths = st.one_of(st.integers(1, 90), st.sampled_from([64, 128, 200, 256]))
several_groups = st.builds(
    qtensor_of,
    lines=widths,
    groups=st.integers(1, 4),
    group_size=st.sampled_from([16, 32, 48, 1, 5, 24, 40]),  # tiles meet several of the later ones
    axis=st.just("out"),
    **kinds,
)
whole_columns = st.builds(
    qtensor_of,
    lines=widths,
    groups=st.just(1),
    group_size=st.one_of(st.integers(1, 50), st.just(300)),  # the last takes several tasks
    axis=st.just("out"),
    **kinds,
)
along_outputs = st.one_of(several_groups, whole_columns)
cases = st.one_of(along_inputs, along_outputs)


def extreme(bits: int, axis: GroupAxis) -> QTensor:
    """A matrix with 48 inputs."""
    if axis == "in":
        return qtensor_of(bits, 20, 3, 16, bits, "half", "whole", 0.0, False)
    return qtensor_of(bits, 48, 2, 16, bits, "half", "whole", 0.0, False, "out")


@pytest.mark.usefixtures("level")
class TestPacked:
    @given(cases, st.sampled_from([1, 2, 3, 8, 17, 67]), arithmetics)
    @example(qtensor_of(0, 33, 2, 64, 4, "half", "whole", 0.01, True), 8, "fast")
    @example(qtensor_of(1, 16, 4, 16, 3, "coded", "whole", 0.3, False), 1, "fast")
    @example(qtensor_of(2, 128, 3, 32, 4, "half", "whole", 0.01, False, "out"), 33, "fast")
    @example(qtensor_of(3, 128, 3, 16, 3, "coded", "coded", 0.3, False, "out"), 1, "exact")
    @example(qtensor_of(4, 100, 5, 24, 4, "half", "coded", 0.3, True, "out"), 17, "fast")
    @example(qtensor_of(5, 64, 9, 5, 3, "coded", "half", 0.01, False, "out"), 1, "fast")
    def test_products_equal_the_reference(
        self, q: QTensor, batch: int, arithmetic: Arithmetic
    ) -> None:
        x = torch.randn(batch, q.codes.shape[1], generator=torch.Generator().manual_seed(batch))
        (found,) = multiply([packed_matrix(q)], x, arithmetic)
        assert close(found, multiply_reference(q, x, arithmetic), x, reach(q))

    @given(cases, st.sampled_from([2, 3, 8, 15, 17, 67]), arithmetics)
    @example(qtensor_of(0, 33, 2, 64, 4, "half", "whole", 0.3, True), 15, "fast")
    @example(qtensor_of(3, 128, 3, 16, 3, "coded", "coded", 0.3, False, "out"), 17, "exact")
    def test_a_row_has_the_bits_that_it_has_alone(
        self, q: QTensor, batch: int, arithmetic: Arithmetic
    ) -> None:
        x = torch.randn(batch, q.codes.shape[1], generator=torch.Generator().manual_seed(batch))
        matrix = packed_matrix(q)
        (found,) = multiply([matrix], x, arithmetic)
        alone = [multiply([matrix], row, arithmetic)[0] for row in x.split(1)]
        assert torch.equal(found.view(torch.int32), torch.cat(alone).view(torch.int32))

    @given(cases)
    def test_decoded_rows_are_the_weights(self, q: QTensor) -> None:
        matrix, weight = packed_matrix(q), q.dequantize()
        assert (matrix.rows, matrix.columns) == weight.shape
        out = torch.empty_like(weight)
        matrix.decode(0, out, pool())
        if q.outliers is None or has_exact_zero(q.grid):
            assert torch.equal(out, weight)
        else:
            assert bool(((out - weight).abs() <= 1e-6 * reach(q)).all())
        last = torch.empty(1, weight.shape[1])
        matrix.decode(len(weight) - 1, last, pool())
        assert torch.equal(last, out[-1:])

    @given(cases, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    @example(qtensor_of(1, 8, 1, 1, 2, "coded", "coded", 0.01, False), torch.float16)
    def test_panels_multiply_by_the_rounded_weights(self, q: QTensor, dtype: torch.dtype) -> None:
        x = torch.randn(5, q.codes.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        found = multiply_panels(packed_matrix(q), x, "exact")
        weight = q.dequantize().to(dtype)
        assert found.dtype == dtype
        size = x.float().abs() @ reach(q).T
        error = (found.float() - x.float() @ weight.float().T).abs()
        # Of subnormal numbers the distance, not the ratio, is what rounding is about.
        limits = torch.finfo(dtype)
        nothing = limits.smallest_normal * limits.eps * (1 + x.float().abs().sum(1, keepdim=True))
        bound = (1e-5 if dtype == torch.float32 else 1e-2) * size + 1e-30 + nothing
        assert bool((error <= bound).all())

    @given(st.integers(2, 8), arithmetics, axes)
    def test_extreme_activations(self, bits: int, arithmetic: Arithmetic, axis: GroupAxis) -> None:
        q = extreme(bits, axis)
        x = torch.zeros(6, 48)
        x[1] = 1e-42  # subnormal
        x[2] = 3e30
        x[3, 5] = -1e30  # alone in its block
        x[4] = torch.linspace(-1e-30, 1e-30, 48)
        x[5, ::7] = 1.0
        (found,) = multiply([packed_matrix(q)], x, arithmetic)
        assert close(found, multiply_reference(q, x, arithmetic), x, reach(q))
        assert torch.equal(found[0], torch.zeros(len(q.codes)))

    @pytest.mark.parametrize("axis", GROUP_AXES)
    def test_what_is_not_finite_stays_so(self, axis: GroupAxis) -> None:
        q = extreme(4, axis)
        for value in (math.inf, -math.inf, math.nan):
            x = torch.ones(2, 48)
            x[0, 20] = value
            for arithmetic in ARITHMETICS:
                (found,) = multiply([packed_matrix(q)], x, arithmetic)
                weight = q.dequantize()[:, 20]
                assert not bool(found[0][weight != 0].isfinite().any())
                assert bool(found[1].isfinite().all())

    @given(st.integers(1, 70), st.integers(1, 90), st.sampled_from([1, 3, 8]), st.booleans())
    def test_float_matrices(self, rows: int, columns: int, batch: int, half: bool) -> None:
        generator = torch.Generator().manual_seed(rows)
        weight = torch.randn(rows, columns, generator=generator)
        weight = weight.half().float() if half else weight
        matrix = float_matrix(weight)
        x = torch.randn(batch, columns, generator=generator)
        (found,) = multiply([matrix], x, "fast")
        assert close(found, x @ weight.T, x, weight)
        out = torch.empty_like(weight)
        matrix.decode(0, out, pool())
        assert torch.equal(out, weight)
        assert matrix.nbytes >= weight.numel() * (2 if half else 4)

    @given(st.lists(cases, min_size=2, max_size=4), arithmetics)
    def test_one_step_for_several_matrices(
        self, found: list[QTensor], arithmetic: Arithmetic
    ) -> None:
        width = found[0].codes.shape[1]
        qs = [q for q in found if q.codes.shape[1] == width]
        qs.append(qtensor_of(9, 30, 1, width, 5, "half", "middle", 0.0, False))
        qs.append(qtensor_of(8, width, 2, 16, 3, "half", "whole", 0.1, False, "out"))
        x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
        together = multiply([packed_matrix(q) for q in qs], x, arithmetic)
        for q, y in zip(qs, together, strict=True):
            assert torch.equal(y, multiply([packed_matrix(q)], x, arithmetic)[0])


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("columns", "group_size"), [(256, 192), (160, 128), (80, 32)])
def test_a_shorter_last_group(columns: int, group_size: int) -> None:
    groups = math.ceil(columns / group_size)
    whole = qtensor_of(1, 20, groups, group_size, 4, "half", "whole", 0.0, False)
    q = QTensor(whole.codes[:, :columns].contiguous(), whole.grid)
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(0))
    for rows in (x[:1], x):
        for arithmetic in ARITHMETICS:
            (found,) = multiply([packed_matrix(q)], rows.contiguous(), arithmetic)
            expected = multiply_reference(q, rows, arithmetic)
            assert close(found, expected, rows, reach(whole)[:, :columns])


@pytest.mark.parametrize(
    "q",
    [
        qtensor_of(0, 500, 8, 64, 3, "coded", "whole", 0.02, True),
        qtensor_of(0, 512, 8, 64, 3, "coded", "whole", 0.02, False, "out"),
        qtensor_of(0, 512, 29, 24, 3, "half", "half", 0.02, False, "out"),
        qtensor_of(0, 512, 1, 700, 3, "half", "middle", 0.02, False, "out"),
    ],
    ids=["along inputs", "along outputs", "across tiles", "whole columns"],
)
def test_threads_do_not_change_a_bit(q: QTensor) -> None:
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    matrix = packed_matrix(q)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        assert pool().threads == count
        results.append(multiply([matrix], x, "fast")[0])
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_matrix_takes_no_more_memory_than_its_layout() -> None:
    for bits in range(2, 9):
        for axis in GROUP_AXES:
            q = qtensor_of(bits, 512, 8, 64, bits, "half", "whole", 0.0, False, axis)
            packed = q.codes.numel() * bits / 8 + 512 * 8 * (2 + bits / 8)
            assert packed_matrix(q).nbytes <= 1.01 * packed + 1024


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("group_size", [32, 27])
def test_a_shorter_last_group_of_outputs(group_size: int) -> None:
    whole = qtensor_of(1, 70, 2, group_size, 4, "half", "whole", 0.0, False, "out")
    q = QTensor(whole.codes[:50].contiguous(), whole.grid)
    x = torch.randn(2, 70, generator=torch.Generator().manual_seed(0))
    for arithmetic in ARITHMETICS:
        (found,) = multiply([packed_matrix(q)], x, arithmetic)
        assert close(found, multiply_reference(q, x, arithmetic), x, reach(whole)[:50])


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("axis", GROUP_AXES)
def test_sizes_beyond_the_matrix_are_those_of_the_matrix(axis: GroupAxis) -> None:
    huge = 2**64 - 1
    q = qtensor_of(1, 36, 1, 40, 4, "coded whole", "coded", 0.0, False, axis)
    grid = q.grid
    assert isinstance(grid.scale, Statistic)
    scale = replace(grid.scale, grid=replace(grid.scale.grid, group_size=huge))
    large = QTensor(q.codes, replace(grid, scale=scale, group_size=huge))
    x = torch.randn(3, q.codes.shape[1], generator=torch.Generator().manual_seed(0))
    for arithmetic in ARITHMETICS:
        found, expected = (multiply([packed_matrix(one)], x, arithmetic)[0] for one in (large, q))
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 1},
        {"bits": 9},
        {"group_size": 0},
        {"order": torch.tensor([0, 1, 2, 8])},
        {"order": torch.tensor([0, 1])},
        {"along_outputs": True},  # statistics are those of rows
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any]) -> None:
    n = native()
    scale = n.Statistic(halves=torch.ones(3, 1, dtype=torch.int16))
    fields = {
        "codes": torch.zeros(3, 4, dtype=torch.uint8),
        "bits": 4,
        "group_size": 4,
        "along_outputs": False,
        "scale": scale,
        "zero": n.Statistic(),
        "order": None,
        "outliers": None,
        "pool": n.Pool(1),
    }
    assert n.Matrix.packed(**fields).rows == 3
    with pytest.raises((ValueError, TypeError)):
        n.Matrix.packed(**{**fields, **change})
