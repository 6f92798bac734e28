"""Activations normed, put into the order of units and rounded, in one pass over each row.

A program takes a whole row: it reads it in the order of the codes, and writes codes, their sums,
and the token's factor or the scale of its own grid; where asked, it also writes what the norm makes
of the row. Importing this module registers the operator ``quantine::round_inputs``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
from torch import Tensor

from quantine.core.fit_range import SMALLEST_ACTIVATION_SCALE, SMALLEST_ACTIVATION_SHARE
from quantine.kernels import backend
from quantine.kernels.integer.token_factors import LARGEST, SMALLEST
from quantine.kernels.integer.triton.programs.rounding import round_row
from quantine.kernels.integer.units.inputs import InputUnits, Rounded
from quantine.kernels.integer.units.layout import QUADS
from quantine.kernels.matrix.triton.warps import LANES
from quantine.kernels.matrix.units.layout import UNIT

EACH: Final = 32
"""Inputs of a thread, where a row is long enough."""
MOST_UNITS: Final = 512
"""Units that a program has in registers at once; longer rows are read several times."""


def round_inputs(x: Tensor, inputs: InputUnits, in_quads: bool) -> Rounded:
    """`quantine.kernels.integer.units.inputs.round_reference` on a GPU.

    Args:
        x: ``[batch, columns]`` float32, float16 or bfloat16.
        inputs: how it is normed and rounded.
        in_quads: in which of its two forms `Rounded` has the codes.
    """
    return Rounded(*_round(x, *inputs.parts(), in_quads, False)[:4])


def norm_and_round(x: Tensor, inputs: InputUnits, in_quads: bool) -> tuple[Tensor, Rounded]:
    """`quantine.kernels.integer.units.inputs.normed_reference` and `round_inputs` in one launch.

    Args:
        x, in_quads: as for `round_inputs`.
        inputs: made by `InputUnits.after`.
    """
    *rounded, normed = _round(x, *inputs.parts(), in_quads, True)
    return normed, Rounded(*rounded)


def launch_of(
    x: Tensor, inputs: InputUnits, rounded: Rounded, normed: Tensor | None = None
) -> tuple[Any, list[Any], dict[str, Any]]:
    """The program, its operands in order, and what is fixed when it is compiled."""
    width = min(MOST_UNITS, triton.next_power_of_2(inputs.units))
    outputs = [rounded.codes.view(torch.int8), rounded.sums, rounded.scale, rounded.shift]
    settings = {
        "UNITS": inputs.units,
        "WIDTH": width,
        "BITS": inputs.bits,
        "CENTRED": inputs.centred,
        "IN_QUADS": rounded.codes.dim() == 3,
        "SMALLEST": SMALLEST,
        "LARGEST": LARGEST,
        "LEAST_SHARE": SMALLEST_ACTIVATION_SHARE,
        "LEAST_SCALE": SMALLEST_ACTIVATION_SCALE,
        "num_warps": max(1, width * UNIT // (EACH * LANES)),
    }
    before = [x, *inputs.parts()[0], inputs.eps, normed]
    return round_row, [*before, *outputs, inputs.columns], settings


@torch.library.custom_op("quantine::round_inputs", mutates_args=())
def _round(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: float,
    in_quads: bool,
    with_normed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs, x = InputUnits.of_parts(tensors, numbers, eps), x.contiguous()
    made = _empty(x, inputs.units, in_quads, with_normed)
    if len(x):
        normed = made[4] if with_normed else None
        program, operands, settings = launch_of(x, inputs, Rounded(*made[:4]), normed)
        with backend.launching(x):
            program[(len(x),)](*operands, **settings)
    return made


@_round.register_fake
def _shapes(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: float,
    in_quads: bool,
    with_normed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    counts = tensors[1]
    assert counts is not None
    return _empty(x, counts.shape[0], in_quads, with_normed)


def _empty(
    x: Tensor, units: int, in_quads: bool, with_normed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for the four tensors of a `Rounded`, and for what the norm writes (or for nothing)."""
    batch = x.shape[0]
    if in_quads:
        codes = x.new_empty(batch, QUADS, units, dtype=torch.int32)
    else:
        codes = x.new_empty(batch, units * UNIT, dtype=torch.int8)
    sums = x.new_empty(batch, units, dtype=torch.float32)
    scale, shift = (x.new_empty(batch, dtype=torch.float32) for _ in range(2))
    normed = x.new_empty(x.shape if with_normed else (0,))
    return codes, sums, scale, shift, normed
