"""Rotating a model: by the wiring that its family describes, or else by one that is derived."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from quantine.core.transform_spec import Rotate
from quantine.families.family import Family
from quantine.rotation.derived import derived_wiring
from quantine.rotation.rotated import Rotated, check_known, rotated, with_rotated_values
from quantine.rotation.wiring import described_wiring

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def rotate(
    model: PreTrainedModel, family: Family, config: PretrainedConfig, asked: Rotate
) -> Rotated:
    """Find out how a model is rotated.

    Args:
        model: only its structure and the classes of its norms matter; weights may be on the meta
            device. Table and head are two parameters where hidden states are rotated.
        family: its architecture.
        config: its configuration.
        asked: what is rotated.

    Raises:
        FamilyError: it cannot be rotated; the message names what is not understood.
    """
    if family.final_norm:
        wiring = described_wiring(model, family, config)
    else:
        untied = copy.deepcopy(config)  # what is proved is proved of hidden states, too
        untied.tie_word_embeddings = False
        wiring = derived_wiring(untied)
    if not asked.hidden:
        return with_rotated_values(model, wiring, asked.seed)
    made = rotated(model, wiring, asked.seed)
    check_known(model, wiring, made.recipes)
    return made
