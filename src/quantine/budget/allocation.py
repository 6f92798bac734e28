"""Spends a budget of bits on layers so that the model's predictions change least.

`choose` spends what is left of the budget, by the sizes and losses that
`quantine.budget.probe.probe` predicted. It is called again for each matrix, so that the total stays
within the budget although the predictions are not exact.
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
"""Number of steps of the search for the price of a byte."""

Array = NDArray[np.float64]
"""Matrix of sizes or losses."""


class Sized(Protocol):
    """A solved matrix whose packed size is known."""

    @property
    def nbytes(self) -> int:
        """Size of the packed matrix in bytes."""
        ...


SomeSized = TypeVar("SomeSized", bound=Sized)
"""The type of the results of the solver that `Allocation.solve` calls."""


def choose(table: Mapping[str, Options], nbytes: int) -> dict[str, int]:
    """The choice for each layer with which the sum of losses is least, within a number of bytes.

    It searches the price of a byte at which each layer's cheapest choice, loss plus price of its
    bytes, fits. If even the smallest choices do not fit, those are taken.

    Args:
        table: size and loss of each choice, by layer name.
        nbytes: bytes that all layers together may take.

    Returns:
        The index of the choice, by layer name.
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
    """Sizes in bytes and losses, ``[layers, most choices]``; infinite where a layer has fewer."""
    most = max((len(options) for options in table.values()), default=1)
    padded = np.full((2, len(table), most), math.inf)
    for layer, options in enumerate(table.values()):
        padded[:, layer, : len(options)] = np.array(options).T
    return padded[0], padded[1]


class Allocation:
    """The budget of a plan: what is left of it, and what the layers that share it may cost.

    Args:
        name: name of the plan, for errors.
        bits_per_weight: bits per weight that the layers may take on average.
        weights: number of weights in all of these layers.
        table: size and loss of each choice by layer name, from `quantine.budget.probe.probe`.

    Raises:
        PlanError: even the smallest choices do not fit into the budget.
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

    def solve(self, name: str, solve: Callable[[int, bool], SomeSized]) -> tuple[SomeSized, int]:
        """Solve a layer with the choice that the budget has room for, and spend its bytes.

        Sizes are predicted, and the last layers cannot make up for earlier ones: where a result
        turns out larger than what is left, the next smaller choice is solved instead. The last
        resort is the smallest choice without outliers, whose size is known and was set aside.

        Args:
            name: name of the layer.
            solve: solves the layer with the choice of that index; without outliers if the second
                argument is true.

        Returns:
            The result that fits, and how many results before it did not.
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

    def give_back(self, nbytes: int) -> None:
        """Add ``nbytes`` that a solved layer turned out not to take; negative takes them."""
        self._left += nbytes

    def spend(self, name: str, nbytes: int) -> None:
        """Subtract the real size of a layer from the budget, if the layer shares the budget.

        Args:
            name: name of the layer.
            nbytes: its packed size in bytes.
        """
        if self._table.pop(name, None) is not None:
            self._left -= nbytes
