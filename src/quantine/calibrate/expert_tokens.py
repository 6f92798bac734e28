"""Tokens for experts: each learns from those that chose it, and the rarely chosen borrow."""

from __future__ import annotations

from collections.abc import Sequence

from quantine.families.layers import Layer
from quantine.statistics.hessian import Hessian


def lend_tokens(layers: Sequence[Layer], hessians: Sequence[Hessian]) -> None:
    """Give experts that too few tokens chose as many as they lack of the mean of all experts.

    Fewer tokens than inputs leave directions in which nothing is known of an expert's inputs. There
    the other experts' inputs count, whose tokens come from the same text. So no expert, however
    rarely chosen, is solved without regard to its inputs.

    Args:
        layers: matrices of a block, in experts or not.
        hessians: those of their inputs, of which those of experts are changed.
    """
    kinds: dict[tuple[str, str], list[Hessian]] = {}
    for layer, hessian in zip(layers, hessians, strict=True):
        if layer.experts:
            kinds.setdefault(layer.stage, []).append(hessian)
    for alike in kinds.values():
        tokens = sum(hessian.tokens for hessian in alike)
        lacking = [hessian for hessian in alike if hessian.tokens < len(hessian.matrix)]
        if not tokens or not lacking:
            continue
        mean = alike[0].matrix.clone()
        for other in alike[1:]:
            mean += other.matrix
        mean /= tokens
        for hessian in lacking:
            hessian.borrow(mean, len(hessian.matrix) - hessian.tokens)
