"""Random matrices and Hessians, like those of real layers, for the fast tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hypothesis import settings
from torch import Tensor

from quantine import Plan, QuantSpec, Scheme, SpQR
from quantine.kernels.gram import add_gram
from quantine.statistics.hessian import Hessian

quick = settings(deadline=None, derandomize=True, max_examples=60)
"""For hypothesis: the same examples in every run, however slow the machine."""


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A float32 matrix ``[rows, columns]`` with the spread of a trained layer's weights."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.05


def correlated_inputs(columns: int, tokens: int, seed: int = 0) -> Tensor:
    """Inputs ``[tokens, columns]`` whose channels are correlated and of unequal strength."""
    generator = torch.Generator().manual_seed(1000 + seed)
    mix = torch.randn(columns, columns, generator=generator)
    strength = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    decay = torch.logspace(0, -2, columns)
    return (torch.randn(tokens, columns, generator=generator) * decay) @ mix * strength


def observed(inputs: Tensor) -> Hessian:
    """A Hessian that has seen ``inputs`` ``[tokens, in]``."""
    hessian = Hessian(inputs.shape[-1], add_gram)
    hessian.update(inputs)
    return hessian


def generator(seed: int) -> torch.Generator:
    """Random numbers of their own."""
    return torch.Generator().manual_seed(seed)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch, and native kernels with it, work on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _published() -> tuple[SpQR, QuantSpec]:
    scheme = Plan.preset("spqr-faithful").rules[0].scheme
    assert isinstance(scheme, Scheme)
    assert isinstance(scheme.solver, SpQR)
    return scheme.solver, scheme.spec


FAITHFUL, FAITHFUL_SPEC = _published()
"""SpQR as its authors published it, and what they ask of a weight."""
