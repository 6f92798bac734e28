"""Blocks of a quantized model, tuned one after another towards those of the float model.

Every block is given what the quantized blocks before it put out, and is to put out what the float
model's block does. So it also makes up for errors before it. Codes change, too (as in AutoRound,
arXiv 2309.05516): tokens say far more about a block, whose every output they compare, than
about the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from quantine.core.tuning_spec import Tuning
from quantine.families.family import Family
from quantine.families.layers import block_list
from quantine.tuning.block_stream import BlockStream
from quantine.tuning.kept_blocks import KeptBlocks
from quantine.tuning.part import Descent, Part
from quantine.tuning.segments import TuningText
from quantine.tuning.student import Student

HELD_OUT: Final = 4
"""Number of the segments that judge by which each block is judged."""
RATE: Final = 2.0
"""How much faster numbers move than where the whole model is tuned, whose gradients are noisier.
Where they move four times as fast, noise changes twice as many codes, and 4 bits gain nothing."""


def block_segments(text: TuningText) -> Tensor:
    """The segments that blocks are judged by, and then those that they are tuned on.

    There are none if blocks are not tuned.
    """
    return torch.cat([text.judges[:HELD_OUT], text.blocks]) if len(text.blocks) else text.blocks


def tune_blocks(
    student: Student,
    family: Family,
    text: TuningText,
    tuning: Tuning,
    kept: KeptBlocks,
    note: Callable[[str], None],
) -> None:
    """Tune numbers and codes of every block of ``student``.

    A block that did not become better on text that it was not tuned on is left as it was.

    Args:
        student: the quantized model.
        family: its architecture.
        text: what to tune on and to judge by, on the model's device.
        tuning: how long and how fast.
        kept: has the blocks that were tuned before this run was stopped, and gets the others.
        note: receives a line about each block.
    """
    segments = block_segments(text)
    floats = BlockStream(student.teacher, family, segments, student.dtype)
    stream = BlockStream(student.model, family, segments, student.dtype)
    for index in range(len(block_list(student.model, family))):
        floats.hidden = floats.outputs(index)
        part = student.block(index, family)
        if part.matrices and (found := kept.read(index)) is not None:
            part.restore(found)
            note(f"block {index} is tuned already")
        elif part.matrices:
            before, after = _tune_block(stream, index, part, student, floats.hidden, tuning)
            kept.write(index, part.snapshot())
            note(f"tuned block {index}: error {before:.4g} before, {after:.4g} after")
        stream.hidden = stream.outputs(index)


def _tune_block(
    stream: BlockStream, index: int, part: Part, student: Student, targets: Tensor, tuning: Tuning
) -> tuple[float, float]:
    """Tune one block towards ``targets``, which are as `BlockStream.hidden`.

    Returns:
        Errors on what judges, before and after, see `_error`.
    """
    student.free_codes(part)
    kept, before = part.snapshot(), _judged(stream, index, targets)
    descent = Descent(part, RATE * tuning.rate, tuning.block_steps)
    count = len(targets) - HELD_OUT
    for step in range(tuning.block_steps):
        for number in range(step * tuning.segments, (step + 1) * tuning.segments):
            place = HELD_OUT + number % count
            with torch.enable_grad():
                found = stream.run(index, stream.hidden[place : place + 1])
                (_error(found, targets[place : place + 1]) / tuning.segments).backward()
        descent.step()
    after = _judged(stream, index, targets)
    if not after < before:  # also where it is no number
        part.restore(kept)
        after = before
    for matrix in part.matrices.values():
        matrix.hold_codes()
    return before, after


@torch.no_grad()
def _judged(stream: BlockStream, index: int, targets: Tensor) -> float:
    """The mean error on the segments that judge."""
    pairs = zip(stream.hidden[:HELD_OUT].split(1), targets[:HELD_OUT].split(1), strict=True)
    errors = [float(_error(stream.run(index, hidden), wanted)) for hidden, wanted in pairs]
    return sum(errors) / len(errors)


def _error(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared difference."""
    return (found - wanted).square().mean()
