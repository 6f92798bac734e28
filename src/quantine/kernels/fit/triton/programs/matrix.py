"""The fit of groups of weights that do not change."""

from __future__ import annotations

import triton
import triton.language as tl

from quantine.kernels.fit.triton.programs.group import fit_group, lines_of


@triton.jit
def fit_matrix(
    columns,
    spread,
    scale_values,
    scale_codes,
    scale_step,
    scale_zero,
    zero_values,
    zero_codes,
    zero_step,
    zero_zero,
    misfits,
    price,
    lines,
    runs,
    to_group,
    to_weight,
    to_line,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    OF_LINES: tl.constexpr,
    FIT: tl.constexpr,
    RUNS: tl.constexpr,
    SPAN: tl.constexpr,
    RUN: tl.constexpr,
):
    """Fit one group of some lines: see `quantine.kernels.fit.triton.groups`."""
    # One number for both: a GPU takes no more than 65535 programs along a second axis.
    groups = tl.num_programs(0) // tl.cdiv(lines, RUNS * RUN)
    group, program = (tl.program_id(0) % groups).to(tl.int64), tl.program_id(0) // groups
    line, there = lines_of(program, lines, RUNS, SPAN, RUN)
    number = tl.arange(0, WIDTH)
    held = (number < LENGTH)[:, None]
    at = (
        group * to_group
        + number.to(tl.int64)[:, None] * to_weight
        + line.to(tl.int64)[None, :] * to_line
    )
    tile = tl.load(columns + at, mask=held & there[None, :], other=0.0)
    if OF_LINES:
        d = tl.load(spread + line, mask=there, other=1.0)[None, :]
    else:
        d = tl.load(spread + group * LENGTH + number, mask=number < LENGTH, other=1.0)[:, None]
    run = program * RUNS + tl.arange(0, RUNS)
    fit_group(
        tile,
        held,
        tl.div_rn(1.0, d * d),
        price,
        there,
        group * lines + line,
        group * runs + run,
        run < runs,
        (scale_values, scale_codes, scale_step, scale_zero),
        (zero_values, zero_codes, zero_step, zero_zero),
        misfits,
        FIT,
        RUNS,
        SPAN,
    )
