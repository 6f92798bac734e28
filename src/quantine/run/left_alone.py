"""Activations that a run does not round although its plan rounds others of their kind."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from quantine.activations.linked import ATTENTION
from quantine.core.activation_spec import SITES, UNQUANTIZED
from quantine.families.layers import block_list
from quantine.run.job import Job

INSIDE: Final = ("query", "key", "value", "softmax")
"""What attention reads, and its probabilities."""
NUMBER: Final = re.compile(r"\.\d+(?=\.|$)")
"""The number of a block in a name."""


def left_alone(job: Job) -> list[dict[str, str]]:
    """What is not rounded: full names of modules that read it, and why.

    The name of a block stands for what its attention reads. Nothing is named where all activations
    stay.
    """
    spec, family = job.plan.activations, job.family
    if spec is None:
        return []
    rounded = {site for site in SITES if getattr(spec, site) != UNQUANTIZED}
    found = []
    if rounded - set(INSIDE):
        found = [(f"{family.blocks}.{index}.{path}", why) for index, path, why in family.left]
    if rounded & set(INSIDE):
        blocks = range(len(block_list(job.model, family)))
        own = [index for index in blocks if not family.in_block(index).attention]
        found += [(f"{family.blocks}.{index}", ATTENTION) for index in own]
    return [{"name": name, "reason": why} for name, why in found]


def left_lines(left: Iterable[Mapping[str, str]]) -> list[str]:
    """One line for each reason in what `left_alone` returns; blocks are not told apart."""
    found: dict[str, dict[str, None]] = {}
    for one in left:
        found.setdefault(one["reason"], {})[NUMBER.sub(".*", one["name"], count=1)] = None
    return [f"{', '.join(names)}: {why}" for why, names in found.items()]
