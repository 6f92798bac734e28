"""Rotating a model: by the wiring that its family describes, or else by one that is derived."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantine.families.family import Family
from quantine.rotation.derived import derived_wiring
from quantine.rotation.rotated import Rotated, check_known, rotated
from quantine.rotation.wiring import described_wiring

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def rotate(model: PreTrainedModel, family: Family, config: PretrainedConfig, seed: int) -> Rotated:
    """Find out how a model is rotated.

    Args:
        model: only its structure and the classes of its norms matter; weights may be on the meta
            device. Table and head are two parameters.
        family: its architecture.
        config: its configuration.
        seed: of the rotations.

    Raises:
        FamilyError: it cannot be rotated; the message names what is not understood.
    """
    if family.final_norm:
        wiring = described_wiring(model, family, config)
    else:
        wiring = derived_wiring(config)
    made = rotated(model, wiring, seed)
    check_known(model, wiring, made.recipes)
    return made
