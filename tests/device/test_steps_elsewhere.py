"""Grids, statistics, solvers and rounded activations wholly on a device that is not the CPU.

It refuses tensors of the CPU, and results are those of the CPU to the bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from other_device import check_same
from quantine.activations.grids import StaticGrid, TokenGrid
from quantine.activations.modules import AttentionSites, GriddedLinear, PermutedNorm
from quantine.activations.reorder import permute_inputs, permute_norm, permute_outputs
from quantine.core import fit_range
from quantine.core.finite import is_finite
from quantine.core.grid import Grid
from quantine.core.permute import input_order, inverse, order_within_heads
from quantine.core.qtensor import QTensor
from quantine.core.sparse import Csr
from quantine.core.spec import QuantSpec
from quantine.families.family import Rows
from quantine.kernels.gram import add_gram
from quantine.methods.gptq import GPTQ
from quantine.methods.rtn import RTN
from quantine.methods.solver import Solver
from quantine.methods.spqr import SpQR
from quantine.rptq.clusters import cluster_channels
from quantine.rptq.feedback import feedback_of
from quantine.rptq.ranges import cheapest_ranges, through, widened
from quantine.statistics.channel_ranges import ChannelRanges
from quantine.statistics.gradients import SquaredGradients
from quantine.statistics.hessian import Hessian
from quantine.statistics.losses import RelativeLoss, TokenLoss, relative_loss, token_loss
from quantine.statistics.sensitivity_map import sensitivity_map
from samples import FAITHFUL, FAITHFUL_SPEC, correlated_inputs, generator, random_weight

ROWS, INPUTS = 32, 48


# Core.


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(3, 16),
        QuantSpec(4, 16, sym=True),
        QuantSpec(3, 16, scale_bits=3, zero_bits=3),
        QuantSpec(3, 16, group_axis="out"),
        QuantSpec(4, 0, cluster_sizes=(30, 17, 1)),
    ],
)
def test_grids_and_what_they_decode_to(spec: QuantSpec) -> None:
    def used(weight: Tensor, order: Tensor, chosen: Tensor) -> list[Any]:
        qtensor = RTN()(weight, None, spec)
        kept = Csr.where(weight.abs() > 0.1, weight)
        ordered = replace(qtensor, in_perm=order, outliers=kept)
        some = qtensor.grid.rows(chosen)
        codes = qtensor.codes[chosen]
        decoded = ordered.dequantize(), qtensor.dequantize(), some.decode(codes)
        return [qtensor, *decoded, some, kept.rows(chosen), kept.row_indices()]

    order = torch.randperm(INPUTS, generator=generator(1))
    check_same(used, random_weight(ROWS, INPUTS), order, torch.tensor([3, 3, 0, 17]))


def test_groups_that_end_early() -> None:
    def used(weight: Tensor, scale: Tensor, zero: Tensor) -> list[Tensor]:
        grid = Grid(scale, zero, 3, 20)
        codes = grid.encode(weight)
        return [codes, grid.decode(codes)]

    scale = torch.rand(ROWS, 3, generator=generator(2)).half() * 0.1
    zero = torch.randint(0, 8, (ROWS, 3), generator=generator(3)).byte()
    check_same(used, random_weight(ROWS, INPUTS), scale, zero)


def test_ranges_become_grids() -> None:
    def fitted(low: Tensor, high: Tensor) -> list[Any]:
        return [
            fit_range.fit_whole(low, high, 4, sym=False),
            fit_range.fit_whole(low, high, 4, sym=True),
            fit_range.fit_fractional(low, high, 4, 8.0),
            fit_range.fit_statistic(high, 3, 5),
            fit_range.fit_activations(low, high, 4),
            fit_range.fit_activations_around_zero(low, high, 4),
            fit_range.fit_activations_as_published(low, high, 4),
        ]

    ends = torch.randn(2, 6, 12, generator=generator(4)).sort(0).values
    check_same(fitted, *ends)


def test_orders_of_inputs() -> None:
    def orders(strength: Tensor, order: Tensor) -> list[Tensor]:
        return [
            input_order(strength, act_order=False),
            input_order(strength, act_order=True),
            input_order(strength, act_order=True, group_size=8),
            inverse(order),
            order_within_heads(order, 4, 3),
        ]

    order = torch.cat([torch.randperm(12, generator=generator(n)) + 12 * n for n in range(4)])
    check_same(orders, torch.rand(INPUTS, generator=generator(5)), order)


# Statistics.


def seen_by(x: Tensor) -> Hessian:
    hessian = Hessian(x.shape[-1], add_gram, x.device)
    hessian.update(x)
    return hessian


def test_hessians() -> None:
    def used(x: Tensor, more: Tensor, delta: Tensor) -> list[Any]:
        hessian = seen_by(x)
        hessian.merge(seen_by(more))
        order = input_order(hessian.matrix.diagonal(), act_order=True)
        factor, energy = hessian.factor(0.01, order), hessian.error_energy(delta)
        assert hessian.factor(0.01, order) is factor
        assert is_finite(factor.upper)
        return [hessian.matrix, factor, hessian.inverse_diagonal(), energy]

    for width in (INPUTS, 300):  # the factor of a large one is found by halving it
        inputs = correlated_inputs(width, 2 * width)
        inputs[:, 3] = 0.0
        check_same(used, inputs[:50], inputs[50:], random_weight(ROWS, width))


def observed_ranges(x: Tensor, more: Tensor) -> ChannelRanges:
    seen, later = (ChannelRanges(x.shape[-1], x.device) for _ in range(2))
    seen.update(x, len(x))
    later.update(more, len(more))
    seen.merge(later)
    return seen


def samples_of_activations() -> tuple[Tensor, Tensor, Tensor]:
    """Two times ``[samples, tokens, channels]``, and labels of the channels."""
    x = torch.randn(6, 24, INPUTS, generator=generator(6)) * torch.logspace(-1, 1, INPUTS)
    labels = torch.arange(5).repeat(10)[:INPUTS].sort().values
    return x[:4] + 0.5, x[4:], labels


def test_ranges_of_channels_and_the_cheapest_of_clusters() -> None:
    def used(x: Tensor, more: Tensor, labels: Tensor, importance: Tensor) -> list[Any]:
        seen = observed_ranges(x, more)
        order = labels.argsort(descending=True, stable=True)
        later = seen.after(2)
        scale, zero = cheapest_ranges(seen, importance, labels, 4)
        return [
            seen.of_channels(),
            [seen.of_clusters(labels, over) for over in ("all", "mean", "running")],
            seen.surprises(),
            seen.ordered(order).of_channels(),
            [later.lows, later.highs, later.firsts, later.rows, later.tokens],
            [scale, zero, through(seen.firsts.mean(0), scale, zero, labels)],
            widened(*seen.of_clusters(labels)),
        ]

    check_same(used, *samples_of_activations(), torch.rand(INPUTS, generator=generator(7)))


def test_clusters_of_channels() -> None:
    def used(points: Tensor) -> list[Any]:
        found = cluster_channels(points, 3, heads=2)
        return [found.labels, found.order, found.ordered().labels, found.shared(2, 3).labels]

    check_same(used, torch.randn(INPUTS, 2, generator=generator(8)))


def test_losses_and_gradients() -> None:
    def used(before: Tensor, after: Tensor) -> list[Any]:
        relative, token, squares = RelativeLoss(), TokenLoss(), SquaredGradients()
        other = SquaredGradients()
        for loss in (relative, token):
            loss.update(before, after)
            loss.merge(loss)
        squares.update(before)
        other.update(after)
        squares.merge(other)
        losses = [relative.value, token.value]
        pair = [before], [after]
        return [squares.mean(), losses, relative_loss(*pair), token_loss(*pair)]

    before = torch.randn(2, 7, INPUTS, generator=generator(9))
    check_same(used, before, before + 0.1 * before.roll(1, 0))


# Solvers.

SOLVERS: dict[str, tuple[Solver, QuantSpec]] = {
    "rtn": (RTN(), QuantSpec(4, 16)),
    "rtn, mse": (RTN("mse"), QuantSpec(3, 16, sym=True)),
    "rtn, out": (RTN("mse"), QuantSpec(3, 16, group_axis="out")),
    "rtn, clusters": (RTN("mse"), QuantSpec(4, 0, cluster_sizes=(30, 17, 1))),
    "gptq": (GPTQ(), QuantSpec(3, 16)),
    "gptq, aligned": (GPTQ(groups="aligned", clip="hessian"), QuantSpec(3, 16)),
    "gptq, refit": (GPTQ(groups="refit", block_size=20), QuantSpec(3, 16, scale_bits=3)),
    "gptq, clusters": (GPTQ(), QuantSpec(4, 0, cluster_sizes=(30, 17, 1))),
    "gptq, out": (GPTQ(), QuantSpec(3, 16, group_axis="out")),
    "spqr": (SpQR(threshold=0.3), QuantSpec(3, 16, scale_bits=3, stat_group_size=16)),
    "spqr, static": (SpQR(groups="static"), QuantSpec(3, 16)),
    "spqr, refit": (SpQR(groups="refit", detect="simple"), QuantSpec(3, 16, zero_bits=3)),
    "spqr, share": (SpQR(outliers=0.02), QuantSpec(3, 16, scale_bits=3)),
    "spqr, out": (SpQR(), QuantSpec(3, 16, scale_bits=3, group_axis="out")),
    "spqr, as published": (FAITHFUL, FAITHFUL_SPEC),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(name: str) -> None:
    solver, spec = SOLVERS[name]

    def solved(weight: Tensor, x: Tensor) -> list[Any]:
        hessian = seen_by(x)
        result = solver(weight, hessian, spec)
        found: list[Any] = [result, result.dequantize()]
        if isinstance(solver, SpQR):
            assert result.outliers is not None
            assert result.outliers.entries
            found.append(solver.predict(weight, hessian, spec))
        diagonal = hessian.inverse_diagonal()
        if diagonal is not None:
            found.append(sensitivity_map(weight, result, diagonal))
        return found

    expected = check_same(solved, random_weight(ROWS, INPUTS), correlated_inputs(INPUTS, 200))
    assert isinstance(expected[0], QTensor)


# Rounded activations.


def static_grid(kind: str) -> StaticGrid:
    _, _, labels = samples_of_activations()
    scale = torch.rand(5, generator=generator(10)) * 0.2 + 0.05
    zero = torch.randint(4, 12, (5,), generator=generator(11)).float()
    fed = torch.randn(4, 12, 12, generator=generator(12)).mul(0.1).triu(1).half()
    return StaticGrid(
        4,
        scale,
        zero,
        labels.to(torch.int32),
        feedback=fed if kind == "feedback" else None,
        reach=torch.tensor([0.85]) if kind == "reach" else None,
    )


@pytest.mark.parametrize("kind", ["static", "reach", "feedback", "token", "refit"])
def test_grids_of_activations(kind: str) -> None:
    def rounded(grid: nn.Module, x: Tensor) -> list[Tensor]:
        if kind == "refit":
            assert isinstance(grid, StaticGrid)
            scale, zero = grid.scale + 0.1, grid.zero
            grid.refit(scale, zero, None, scale.new_tensor([0.7]))
        return [grid(x), grid(x.bfloat16())]

    x, _, _ = samples_of_activations()
    check_same(rounded, TokenGrid(4) if kind == "token" else static_grid(kind), x)


def test_feedback() -> None:
    rows = torch.randn(4, 40, 12, generator=generator(13))
    check_same(feedback_of, rows.transpose(1, 2) @ rows)


def test_modules_that_round_and_norms_that_reorder() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm: nn.Module = nn.LayerNorm(INPUTS)
            self.first, self.last = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, ROWS)
            self.sites = AttentionSites()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.sites.key(self.first(self.norm(x))))
            return out

    @torch.no_grad()
    def used(block: Block, grid: StaticGrid, x: Tensor, order: Tensor) -> list[Any]:
        block.first.weight.copy_(block.first.weight.flip(0))
        permute_norm(block, "norm", order)
        assert isinstance(block.norm, PermutedNorm)
        permute_inputs(block.first, order, 1)
        found = [block(x)]
        rows: Rows
        for rows in ("parts", "last", "interleaved"):
            # A third of the rows, which stays within its four heads.
            part = order if rows == "parts" else order[order % 12 < 4] % 4 + order_of_heads(order)
            permute_outputs(block.first, part, rows, 4)
            found.append(block(x))
        block.first = GriddedLinear(block.first, grid)
        return [*found, block(x)]

    def order_of_heads(order: Tensor) -> Tensor:
        return torch.arange(16, device=order.device) // 4 * 4

    torch.manual_seed(0)
    order = torch.cat([torch.randperm(12, generator=generator(n)) + 12 * n for n in range(4)])
    x, _, _ = samples_of_activations()
    check_same(used, Block(), static_grid("static"), x, order)
