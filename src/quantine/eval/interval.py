"""Averages of paired measurements, with standard errors and 95% confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

NORMAL: Final = 1.959964
"""Quantile of the standard normal distribution that leaves 2.5% above it."""
FEWEST: Final = 4
"""Number of samples below which no interval is given, as it would say nothing."""


@dataclass(frozen=True)
class Interval:
    """A number and its 95% confidence interval.

    Attributes:
        value: the number.
        low, high: ends of the interval; ``None`` with too few samples.
    """

    value: float
    low: float | None = None
    high: float | None = None


def mean_with_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of ``values`` and its standard error, ``None`` for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def perplexity_recovery(losses: Sequence[float], reference: Sequence[float]) -> Interval:
    """The reference's perplexity divided by the model's: 1 is as good, below 1 is worse.

    Pairing windows removes from the interval what makes a window hard for both models.

    Args:
        losses: mean loss of each window in nats, of the model. One that is NaN counts as infinite:
            the recovery is then 0.
        reference: the same of the reference, on the same windows.
    """
    if any(map(math.isnan, losses)):
        return Interval(0.0)
    differences = [own - other for own, other in zip(losses, reference, strict=True)]
    mean, error = mean_with_error(differences)
    if error is None or len(differences) < FEWEST or not math.isfinite(mean):
        return Interval(_exp(-mean))
    reach = t_quantile(len(differences) - 1) * error
    return Interval(_exp(-mean), _exp(-mean - reach), _exp(-mean + reach))


def score_recovery(scores: Sequence[float], reference: Sequence[float]) -> Interval | None:
    """The model's mean score divided by the reference's, with questions paired.

    The interval is that of a ratio of means by the delta method.

    Args:
        scores: score of each question, of the model.
        reference: the same of the reference, on the same questions.

    Returns:
        ``None`` if the reference's mean score is 0.
    """
    base, _ = mean_with_error(reference)
    if base == 0:
        return None
    ratio = mean_with_error(scores)[0] / base
    rests = [own - ratio * other for own, other in zip(scores, reference, strict=True)]
    error = mean_with_error(rests)[1]
    if error is None or len(rests) < FEWEST:
        return Interval(ratio)
    reach = t_quantile(len(rests) - 1) * error / base
    return Interval(ratio, ratio - reach, ratio + reach)


def t_quantile(freedom: int) -> float:
    """The quantile of Student's t distribution that leaves 2.5% above it.

    By the expansion around the normal quantile of Abramowitz and Stegun, 26.7.5, which is within 1%
    from 3 degrees of freedom on.

    Args:
        freedom: degrees of freedom.
    """
    z, z2 = NORMAL, NORMAL**2
    return z * (
        1
        + (z2 + 1) / (4 * freedom)
        + (5 * z2**2 + 16 * z2 + 3) / (96 * freedom**2)
        + (3 * z2**3 + 19 * z2**2 + 17 * z2 - 15) / (384 * freedom**3)
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < math.log(1e300) else math.inf
