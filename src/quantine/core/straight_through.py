"""Gradients that pass rounding as if it were not there (a straight-through gradient)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """The values of ``rounded``, whose gradients go to ``exact``.

    Args:
        exact: of any float dtype.
        rounded: what ``exact`` was rounded to, of the same shape and dtype.
    """
    found: Tensor = _StraightThrough.apply(exact, rounded)  # type: ignore[no-untyped-call]
    return found
