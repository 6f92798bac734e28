"""Activations that a run does not round although its plan rounds others of their kind."""

from __future__ import annotations

from typing import Final

from quantine.activations.linked import ATTENTION
from quantine.core.activation_spec import SITES, UNQUANTIZED
from quantine.families.layers import block_list
from quantine.run.job import Job

INSIDE: Final = ("query", "key", "value", "softmax")
"""What attention reads, and its probabilities."""


def left_alone(job: Job) -> dict[str, str]:
    """Why the inputs of modules are not rounded, by full names; empty where activations stay.

    The name of a block stands for what its attention reads.
    """
    spec, family = job.plan.activations, job.family
    if spec is None:
        return {}
    rounded = {site for site in SITES if getattr(spec, site) != UNQUANTIZED}
    found = {}
    if rounded - set(INSIDE):
        found = {f"{family.blocks}.{index}.{path}": why for index, path, why in family.left}
    if rounded & set(INSIDE):
        for index in range(len(block_list(job.model, family))):
            if not family.in_block(index).attention:
                found[f"{family.blocks}.{index}"] = ATTENTION
    return found
