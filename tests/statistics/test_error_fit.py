"""Regression of errors on the inputs of a matrix, and tokens that are louder than others."""

from __future__ import annotations

import torch
from torch import Tensor

from quantine.kernels.gram import add_gram
from quantine.statistics.error_fit import RIDGE, ErrorFit, is_loud


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(x: Tensor, errors: Tensor, loud: Tensor | None = None) -> Tensor:
    fit = ErrorFit(errors.shape[1], x.shape[1], add_gram, torch.device("cpu"))
    loud = torch.zeros(len(x), dtype=torch.bool) if loud is None else loud
    for rows in torch.arange(len(x)).split(50):
        fit.update(x[rows], errors[rows], loud[rows])
    change = fit.change()
    assert change is not None
    assert torch.equal(change, fit.change())
    return change


def test_the_change_is_a_ridge_regression() -> None:
    x, errors = normal(400, 12), normal(400, 7, seed=1)
    x[:, 0] *= 5
    ridge = RIDGE * x.square().mean(-1).sum().double()
    inputs = x.double().T @ x.double() + ridge * torch.eye(12, dtype=torch.float64)
    wanted = -torch.linalg.solve(inputs, x.double().T @ errors.double()).T
    torch.testing.assert_close(fitted(x, errors), wanted.float(), rtol=1e-4, atol=1e-5)


def test_what_follows_from_inputs_is_taken_off() -> None:
    x, others = normal(4000, 16), normal(4000, 8, seed=2)
    predictable = x @ normal(16, 8, seed=1)
    left = predictable + others + x @ fitted(x, predictable + others).T
    assert left.square().mean() < 0.15 * predictable.square().mean() + others.square().mean()


def test_loud_tokens_keep_what_they_get_and_their_errors_do_not_count() -> None:
    x, errors = normal(2000, 16), normal(2000, 8, seed=1)
    errors += x @ normal(16, 8, seed=2)
    loud = torch.zeros(2000, dtype=torch.bool)
    loud[::100] = True
    x[loud] = 1000 * normal(1, 16, seed=3)
    plain = fitted(x, errors, loud)
    assert torch.equal(plain, fitted(x, torch.where(loud[:, None], 1e6, errors), loud))
    quiet = fitted(x[~loud], errors[~loud])
    reached = (x[loud][0] @ plain.T).norm() / (x[loud][0] @ quiet.T).norm()
    assert reached < 0.01


def test_there_is_no_change_where_sums_are_no_numbers_or_nothing_is_read() -> None:
    for x in (torch.full((8, 4), float("nan")), torch.zeros(8, 4)):
        fit = ErrorFit(3, 4, add_gram, torch.device("cpu"))
        fit.update(x, normal(8, 3), torch.zeros(8, dtype=torch.bool))
        assert fit.change() is None
    fit = ErrorFit(3, 4, add_gram, torch.device("cpu"))
    fit.update(normal(8, 4), torch.full((8, 3), float("inf")), torch.zeros(8, dtype=torch.bool))
    assert fit.change() is None


def test_tokens_are_loud_by_the_median_of_their_segment() -> None:
    hidden = torch.ones(2, 8, 4)
    hidden[0, 0] *= 9.9
    hidden[1, 3] *= -10.1
    assert is_loud(hidden).nonzero().tolist() == [[1, 3]]
