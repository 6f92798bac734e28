"""How a budget of bits is spent, so that the model's predictions change least.

`choose` spends what is left, given what `quantine.budget.probe.probe` found. It is called again for
each matrix, so that the whole ends within the budget although sizes are only predicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from quantine.budget.probe import Options
from quantine.errors import PlanError

HALVINGS: Final = 100
"""Steps of the search for the price of a byte."""

Array = NDArray[np.float64]


class Sized(Protocol):
    """A solved matrix."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes when it is packed."""
        ...


Solved = TypeVar("Solved", bound=Sized)


def choose(table: Mapping[str, Options], nbytes: int) -> dict[str, int]:
    """The choice of each layer of ``table`` with the least sum of losses in ``nbytes`` bytes.

    Finds the price of a byte at which the layers' own best choices fit. Where even the smallest do
    not fit, those are taken.
    """
    sizes, losses = _padded(table)
    layers = np.arange(len(table))
    low, high = 0.0, math.inf
    price = 1e-9
    best = sizes.argmin(1)
    for _ in range(HALVINGS):
        tried = (losses + price * sizes).argmin(1)
        if sizes[layers, tried].sum() <= nbytes:
            best, high = tried, price
        else:
            low = price
        price = price * 8 if high == math.inf else math.sqrt(max(low, 1e-30) * high)
    return dict(zip(table, best.tolist(), strict=True))


def _padded(table: Mapping[str, Options]) -> tuple[Array, Array]:
    """Bytes and losses ``[layers, most choices]``, infinite where a layer has fewer."""
    most = max((len(options) for options in table.values()), default=1)
    padded = np.full((2, len(table), most), math.inf)
    for layer, options in enumerate(table.values()):
        padded[:, layer, : len(options)] = np.array(options).T
    return padded[0], padded[1]


class Allocation:
    """A budget, and what the layers that share it may cost.

    Args:
        name: of the plan, for errors.
        bits_per_weight: what layers may take on average.
        weights: number of weights in all of them.
        table: of `quantine.budget.probe.probe`.

    Raises:
        PlanError: no choices fit into the budget.
    """

    def __init__(
        self, name: str, bits_per_weight: float, weights: int, table: Mapping[str, Options]
    ) -> None:
        self._table = dict(table)
        self._left = int(weights * bits_per_weight / 8)
        least = sum(min(nbytes for nbytes, _ in options) for options in table.values())
        if least > self._left:
            raise PlanError(
                f"plan {name!r}: {bits_per_weight:g} bits per weight are too few: the smallest "
                f"choices take about {least * 8 / weights:.3f} with their outliers: raise "
                "bits_per_weight, or add a choice with threshold inf"
            )

    def solve(self, name: str, solve: Callable[[int, bool], Solved]) -> tuple[Solved, int]:
        """Solve layer ``name`` with the choice that the budget has room for.

        Sizes are predicted, and the last layers cannot make up for earlier ones: where a choice
        turns out too large for what is left, the next smaller one is solved instead. In the end
        that is the smallest without outliers, whose size is known and was set aside.

        Args:
            solve: with the choice of a number; without outliers, if the second argument is true.

        Returns:
            What fits, and how many choices were solved in vain before it.
        """
        options = self._table[name]
        chosen = choose(self._table, self._left)[name]
        smaller = [index for index, (size, _) in enumerate(options) if size < options[chosen][0]]
        tried = [chosen, *sorted(smaller, key=lambda index: -options[index][0])]
        least = sum(
            min(size for size, _ in found) for key, found in self._table.items() if key != name
        )
        attempts = [*((index, False) for index in tried), (tried[-1], True)]
        solved, in_vain = solve(*attempts[0]), 0
        for attempt in attempts[1:]:
            if solved.nbytes + least <= self._left:
                break
            solved, in_vain = solve(*attempt), in_vain + 1
        self.spend(name, solved.nbytes)
        return solved, in_vain

    def spend(self, name: str, nbytes: int) -> None:
        """Take what a layer really costs off the budget, if it shares it."""
        if self._table.pop(name, None) is not None:
            self._left -= nbytes
