"""Architectures: those described by a literal, and all others, which are studied when needed.

docs/adding.md shows how to describe one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES: tuple[Family, ...] = (LLAMA, GEMMA, PHI3, OPT, GPT_NEOX, FALCON, BLOOM, GPT2)
"""All architectures that are described, among which `described_family` searches."""


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model: as described, or else as `quantine.families.derivation` finds it.

    Args:
        config: the model's configuration in transformers.

    Raises:
        FamilyError: it is not described, and not understood; the message says what is not.
    """
    if is_described(config.model_type):
        return described_family(config.model_type)
    from quantine.families.derivation.derive import derive

    return derive(config)


def is_described(model_type: str) -> bool:
    """Whether a literal describes the models with this ``model_type`` in their ``config.json``."""
    return any(model_type in family.model_types for family in FAMILIES)


def described_family(model_type: str) -> Family:
    """The literal that describes the models with this ``model_type`` in their ``config.json``.

    Raises:
        FamilyError: none does; the message lists the model types that are described.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    covered = ", ".join(sorted(kind for family in FAMILIES for kind in family.model_types))
    raise FamilyError(f"model type {model_type!r} is not described; described: {covered}")
