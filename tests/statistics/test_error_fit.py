"""Regression of errors on the inputs of a matrix, and tokens that are louder than others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantine.kernels.gram import add_gram
from quantine.statistics.error_fit import RIDGES, ErrorFit, is_loud, trust


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def summed(
    x: Tensor, errors: Tensor, counts: Tensor | None = None, loud: Tensor | None = None
) -> ErrorFit:
    fit = ErrorFit(errors.shape[1], x.shape[1], add_gram, torch.device("cpu"))
    loud = torch.zeros(len(x), dtype=torch.bool) if loud is None else loud
    counts = torch.ones(len(x)) if counts is None else counts
    for rows in torch.arange(len(x)).split(50):
        fit.update(x[rows], errors[rows], counts[rows], loud[rows])
    return fit


def fitted(
    x: Tensor,
    errors: Tensor,
    counts: Tensor | None = None,
    loud: Tensor | None = None,
    ridge: float = 0.3,
) -> Tensor:
    fit = summed(x, errors, counts, loud)
    change = fit.change(ridge)
    assert change is not None
    assert torch.equal(change, fit.change(ridge))
    return change


@pytest.mark.parametrize("ridge", RIDGES)
def test_the_change_is_a_ridge_regression_in_which_tokens_count(ridge: float) -> None:
    x, errors = normal(400, 12), normal(400, 7, seed=1)
    x[:, 0] *= 5
    counts = normal(400, seed=2).sigmoid()
    loud = torch.arange(400) % 80 == 0
    counts[loud], errors[loud] = 1, 0
    rows = x.double() * counts[:, None].double()
    added = ridge * (rows * x)[~loud].mean(-1).sum()
    inputs = rows.T @ x.double() + added * torch.eye(12, dtype=torch.float64)
    wanted = -torch.linalg.solve(inputs, rows.T @ errors.double()).T
    found = fitted(x, errors, counts, loud, ridge=ridge)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-5)


def test_what_a_change_takes_off_is_predicted() -> None:
    x, errors, counts = normal(400, 12), normal(400, 7, seed=1), normal(400, seed=2).sigmoid()
    change = 0.1 * normal(7, 12, seed=3)
    fit = summed(x, errors, counts)
    before, after = (
        float((counts[:, None] * wrong.square()).sum()) for wrong in (errors, errors + x @ change.T)
    )
    assert fit.squared == pytest.approx(before, rel=1e-5)
    assert fit.taken_off(change) == pytest.approx(before - after, rel=1e-3)


def test_what_follows_from_inputs_is_taken_off() -> None:
    x, others = normal(4000, 16), normal(4000, 8, seed=2)
    predictable = x @ normal(16, 8, seed=1)
    left = predictable + others + x @ fitted(x, predictable + others).T
    assert left.square().mean() < 0.15 * predictable.square().mean() + others.square().mean()


def test_a_few_large_errors_do_not_decide() -> None:
    x, wanted = normal(1000, 16), normal(8, 16, seed=1)
    errors = x @ wanted.T + 0.1 * normal(1000, 8, seed=2)
    errors[::50] = 100 * normal(20, 8, seed=3)
    counts = trust(errors.view(2, 500, 8), torch.zeros(2, 500, dtype=torch.bool)).flatten()
    found, plain = fitted(x, errors, counts, ridge=0.1), fitted(x, errors, ridge=0.1)
    assert (found + wanted).norm() < 0.3 * (plain + wanted).norm()


def test_tokens_count_by_their_errors_and_the_median_of_their_segment() -> None:
    errors = torch.tensor([[3.0, 1e9, 0, 1, 2], [0, 0, 0, 0, 2]]).unsqueeze(2).expand(2, 5, 3)
    loud = torch.zeros(2, 5, dtype=torch.bool)
    loud[0, 1] = True
    # The median of 9, 0, 1 and 4 is 1, the lower of two; that of all five squares would be 4.
    wanted = [[0.1, 0, 1, 0.5, 0.2], [1, 1, 1, 1, 0]]
    torch.testing.assert_close(trust(errors, loud), torch.tensor(wanted))
    assert trust(errors, torch.ones_like(loud)).eq(0).all()


def test_loud_tokens_keep_what_they_get_and_their_errors_do_not_count() -> None:
    x, errors = normal(2000, 16), normal(2000, 8, seed=1)
    errors += x @ normal(16, 8, seed=2)
    loud = torch.zeros(2000, dtype=torch.bool)
    loud[::100] = True
    x[loud] = 1000 * normal(1, 16, seed=3)
    counts = torch.where(loud, 0.0, 1.0)
    plain = fitted(x, errors, counts, loud)
    assert torch.equal(plain, fitted(x, torch.where(loud[:, None], 1e6, errors), counts, loud))
    quiet = fitted(x[~loud], errors[~loud])
    reached = (x[loud][0] @ plain.T).norm() / (x[loud][0] @ quiet.T).norm()
    assert reached < 0.01


def test_there_is_no_change_where_sums_are_no_numbers_or_nothing_is_read() -> None:
    for x in (torch.full((8, 4), float("nan")), torch.zeros(8, 4)):
        assert summed(x, normal(8, 3)).change(0.3) is None
    assert summed(normal(8, 4), torch.full((8, 3), float("inf"))).change(0.3) is None


def test_tokens_are_loud_by_the_median_of_their_segment() -> None:
    hidden = torch.ones(2, 8, 4)
    hidden[0, 0] *= 9.9
    hidden[1, 3] *= -10.1
    assert is_loud(hidden).nonzero().tolist() == [[1, 3]]
