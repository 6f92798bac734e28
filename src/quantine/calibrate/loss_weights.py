"""What the loss depends on: which calibration tokens count, and which errors of outputs add up.

A Hessian whose tokens all count alike measures the error of a matrix's outputs. What matters is
what the model's predictions make of it: a change ``dy`` of an output changes them by about
``(g @ dy)**2 / 2``, see `quantine.statistics.gradients`, and ``g`` differs widely between tokens.
So a token is weighted by the squared gradients of the outputs of the matrix that reads it, as
GuidedQuant does for groups of rows (arXiv 2505.07004). Here all rows of a matrix share the weights.
Matrices with one input do not, so that each has a Hessian and a factor of its own.

Single gradients are noisy, and few tokens with large ones would stand for all. Weights are
therefore the mean squares to the power of `POWER`.

The same pass finds how the outputs of a matrix make up for each other's errors, see
`quantine.statistics.output_covariance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from quantine.calibrate.backward import there_and_back
from quantine.calibrate.block_loader import BlockLoader
from quantine.calibrate.setup import CalibrationSetup
from quantine.errors import CalibrationError
from quantine.families.layers import Layer
from quantine.statistics.gradients import TokenGradients
from quantine.statistics.output_covariance import OutputCovariance

POWER: Final = 0.5
"""Power to which the mean squared gradients of a token are raised."""


@dataclass(frozen=True)
class OutputGradients:
    """What is made of the gradients with respect to the outputs of one matrix.

    Attributes:
        tokens: the mean square of each token.
        covariance: their second moments.
    """

    tokens: TokenGradients = field(default_factory=TokenGradients)
    covariance: OutputCovariance = field(default_factory=OutputCovariance)

    def update(self, gradient: Tensor) -> None:
        """Add the gradients ``[..., out]`` of some tokens."""
        self.tokens.update(gradient)
        self.covariance.update(gradient)


def loss_weights(
    setup: CalibrationSetup,
    loader: BlockLoader,
    layers: Sequence[Layer],
    read: Callable[[str], Tensor],
    scratch: Path,
    seed: int,
    note: Callable[[str], None],
    keep: Callable[[int, dict[str, Tensor]], None],
) -> dict[str, Tensor]:
    """How much each token counts, from one pass forward and backward through the float model.

    Args:
        setup: the calibration segments and the model.
        loader: gives the blocks their weights.
        layers: matrices of blocks.
        read: reads the float tensor that the model calls by a name.
        scratch: directory for the inputs of all blocks.
        seed: seed of the generator that draws tokens from the predictions.
        note: receives lines about the progress.
        keep: receives the number of each block and the couplings of its matrices by name, see
            `OutputCovariance.coupling`, on the CPU.

    Returns:
        By name of the layer, ``[tokens]`` float32 on the CPU, on average 1.

    Raises:
        CalibrationError: a gradient is infinite or NaN.
    """
    own = replace(setup, spill=scratch / "states", saved=None, replaced={}, resumes=False)
    steps = there_and_back(
        own,
        loader,
        layers,
        OutputGradients,
        read,
        scratch,
        seed,
        lambda said: note(f"gradients: {said}"),
    )
    found: dict[str, Tensor] = {}
    for index, seen in steps:
        found.update({name: _weights(name, one.tokens.means().cpu()) for name, one in seen.items()})
        keep(index, {name: one.covariance.coupling().cpu() for name, one in seen.items()})
    return found


def _weights(name: str, mean: Tensor) -> Tensor:
    """The weights of the tokens that a matrix reads.

    All count alike if the loss does not depend on the matrix.

    Args:
        name: name of the layer, for errors.
        mean: the mean squared gradient of each token, ``[tokens]`` float32.
    """
    level = mean.mean()
    if not bool(torch.isfinite(level)):
        raise CalibrationError(
            f"{name}: gradients of the float model are not finite: use another calibration text, "
            "or a plan without loss_weights"
        )
    if not level > 0:
        return torch.ones_like(mean)
    tempered = (mean / level).pow_(POWER)
    return tempered / tempered.mean()
