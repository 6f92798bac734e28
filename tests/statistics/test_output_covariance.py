"""What errors of outputs ask of each other: against their second moments, and by what it saves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantine.core.spec import QuantSpec
from quantine.kernels.gram import add_gram
from quantine.methods.gptq import GPTQ
from quantine.statistics.hessian import Hessian
from quantine.statistics.output_covariance import DAMP, RUN, OutputCovariance, reordered, turned
from samples import generator, random_weight


def gradients(tokens: int, outputs: int, seed: int = 0) -> Tensor:
    """Gradients of outputs that act together, some tokens' a thousand times those of others."""
    few = torch.randn(tokens, 4, generator=generator(seed))
    found = few @ torch.randn(4, outputs, generator=generator(seed + 1))
    found += 0.2 * torch.randn(tokens, outputs, generator=generator(seed + 2))
    return found * 10.0 ** (3 * torch.rand(tokens, 1, generator=generator(seed + 3)))


def moments(found: Tensor) -> Tensor:
    """Their second moments in float64, a token counted by the root of its mean square."""
    rows = found.double() / found.double().square().mean(1, keepdim=True) ** 0.25
    return rows.T @ rows


@pytest.mark.parametrize("outputs", [1, 6, 100])
def test_it_is_the_unit_factor_of_the_damped_moments(outputs: int) -> None:
    found = gradients(300, outputs)
    seen = OutputCovariance()
    for part in found.view(3, 10, 10, outputs):
        seen.update(part)
    damped = moments(found)
    damped += DAMP * damped.diagonal().mean() * torch.eye(outputs, dtype=torch.float64)
    coupling = seen.coupling().double()
    assert torch.equal(coupling, coupling.tril())
    lower = coupling.tril(-1) + torch.eye(outputs, dtype=torch.float64)
    costs = torch.linalg.inv(lower) @ damped @ torch.linalg.inv(lower).T
    diagonal = torch.diag(costs.diagonal())
    torch.testing.assert_close(costs, diagonal, rtol=0, atol=1e-4 * float(diagonal.max()))
    level = float(moments(found).diagonal().mean())
    torch.testing.assert_close(coupling.diagonal() * level, costs.diagonal(), rtol=1e-3, atol=0)


def test_many_outputs_have_runs_of_their_own() -> None:
    outputs = 2 * RUN + 1
    seen = OutputCovariance()
    found = gradients(40, outputs)
    seen.update(found)
    coupling = seen.coupling()
    run = coupling.shape[1]
    assert coupling.shape[0] == outputs
    assert run == 576  # three of 513 outputs, in whole units
    # The last run is shorter. All count a token by the mean square of all of its outputs.
    level = moments(found).diagonal().mean()
    for first in range(0, outputs, run):
        part = moments(found)[first : first + run, first : first + run]
        lower = torch.linalg.cholesky(part + DAMP * level * torch.eye(len(part)))
        wanted = (lower / lower.diagonal()).tril(-1)
        wanted += torch.diag(lower.diagonal().square() / level)
        mine = coupling[first : first + run].double()
        torch.testing.assert_close(mine[:, : len(part)], wanted, rtol=1e-3, atol=1e-4)
        assert not bool(mine[:, len(part) :].any())


def test_outputs_on_which_nothing_depends_ask_nothing() -> None:
    seen = OutputCovariance()
    seen.update(torch.zeros(5, 7))
    coupling = seen.coupling()
    assert not bool(coupling.tril(-1).any())
    assert torch.allclose(coupling.diagonal(), torch.full((7,), DAMP))


def moved(found: Tensor, order: Tensor) -> Tensor:
    """The coupling of outputs whose gradients were ``found`` after they got another order."""
    seen = OutputCovariance()
    seen.update(found[:, order])
    return seen.coupling()


@pytest.mark.parametrize("outputs", [1, 6, 100])
def test_outputs_in_another_order_ask_what_they_asked(outputs: int) -> None:
    found = gradients(300, outputs)
    order = torch.randperm(outputs, generator=generator(5))
    wanted = moved(found, order)
    torch.testing.assert_close(
        reordered(moved(found, torch.arange(outputs)), order), wanted, rtol=1e-3, atol=1e-4
    )


def test_outputs_that_come_into_one_run_only_then_ask_nothing() -> None:
    outputs = 2 * RUN + 1
    found = gradients(40, outputs)
    whole = torch.arange(outputs)
    before = moved(found, whole)
    run = before.shape[1]
    torch.testing.assert_close(reordered(before, whole), before, rtol=1e-3, atol=1e-4)
    # Inside of their runs, the last of which is shorter.
    inside = torch.cat(
        [part[torch.randperm(len(part), generator=generator(5))] for part in whole.split(run)]
    )
    torch.testing.assert_close(
        reordered(before, inside), moved(found, inside), rtol=1e-3, atol=1e-4
    )
    across = torch.randperm(outputs, generator=generator(6))
    after = reordered(before, across)
    of = across // run
    for first in range(0, outputs, run):
        part, old = after[first : first + run], of[first : first + run]
        apart = old.unsqueeze(1) != old
        lower, costs = part[:, : len(part)].double(), part.diagonal().double()
        unit = lower.tril(-1) + torch.eye(len(part), dtype=torch.float64)
        assert not bool(((unit * costs) @ unit.T)[apart].abs().gt(1e-5).any())
        assert not bool(part[:, len(part) :].any())


@pytest.mark.parametrize("outputs", [96, 2 * RUN + 16])
def test_turned_outputs_ask_what_their_gradients_say(outputs: int) -> None:
    found = gradients(40, outputs)
    before = moved(found, torch.arange(outputs))
    # Heads of 16 outputs lie inside of runs, and some of the outputs stay.
    turn = torch.eye(outputs)
    for start in range(0, outputs - 16, 16):
        square = torch.randn(16, 16, generator=generator(start))
        turn[start : start + 16, start : start + 16] = torch.linalg.qr(square)[0]
    # Turning keeps the mean square of a token, and so what it counts.
    wanted = moved((found.double() @ turn.double()).float(), torch.arange(outputs))
    torch.testing.assert_close(turned(before, turn), wanted, rtol=1e-3, atol=2e-4)
    order = torch.randperm(outputs, generator=generator(9))
    as_matrix = torch.eye(outputs)[:, order]
    torch.testing.assert_close(
        turned(before, as_matrix), reordered(before, order), rtol=1e-3, atol=2e-4
    )


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("scale_bits", [16, 3])
def test_the_error_that_it_stands_for_is_smaller(axis: str, scale_bits: int) -> None:
    outputs, inputs = 64, 48
    weight, x = random_weight(outputs, inputs), torch.randn(500, inputs, generator=generator(7))
    found = gradients(400, outputs)
    seen = OutputCovariance()
    seen.update(found)
    spec = QuantSpec(3, 16, scale_bits=scale_bits, group_axis="out" if axis == "out" else "in")

    def cost(coupling: Tensor | None) -> float:
        hessian = Hessian(inputs, add_gram)
        hessian.update(x)
        hessian.coupling = coupling
        change = GPTQ(groups="aligned")(weight, hessian, spec).dequantize().double() - weight
        total = (moments(found) * (change @ hessian.matrix.double() @ change.T)).sum()
        return math.sqrt(float(total))

    assert cost(seen.coupling()) < 0.7 * cost(None)
