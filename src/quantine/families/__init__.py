"""Supported architectures, each described by one literal; docs/adding.md shows how to add one."""

from quantine.errors import FamilyError
from quantine.families.bloom import BLOOM
from quantine.families.falcon import FALCON
from quantine.families.family import Family
from quantine.families.gemma import GEMMA
from quantine.families.gpt2 import GPT2
from quantine.families.gpt_neox import GPT_NEOX
from quantine.families.llama import LLAMA
from quantine.families.opt import OPT
from quantine.families.phi3 import PHI3

FAMILIES: tuple[Family, ...] = (LLAMA, GEMMA, PHI3, OPT, GPT_NEOX, FALCON, BLOOM, GPT2)
"""All supported architectures, among which `family_of` searches."""


def family_of(model_type: str) -> Family:
    """The family that covers a model type.

    Args:
        model_type: the value of ``model_type`` in the model's ``config.json``.

    Raises:
        FamilyError: no family does; the message lists the model types that are covered.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    covered = ", ".join(sorted(kind for family in FAMILIES for kind in family.model_types))
    raise FamilyError(f"model type {model_type!r} is not supported; supported: {covered}")
