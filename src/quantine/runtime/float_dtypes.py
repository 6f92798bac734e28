"""Dtypes of the floats of a model that transformers has loaded: those in which it was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def float_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Dtypes that the float parameters of ``model`` shall have, by name.

    Args:
        model: before its tensors are read, built in the dtype that ``from_pretrained`` was asked
            for. What its class keeps in float32 (``_keep_in_fp32_modules``) is float32.
    """
    kept = model._get_dtype_plan(model.dtype)
    return {
        name: next((dtype for part, dtype in kept.items() if part in name), parameter.dtype)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
    }


def convert_floats(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Convert float parameters whose dtype is not that of `float_dtypes`.

    transformers 5.19 does so itself only where a tensor has the same name in the files: those of a
    bare model, whose names lose the prefix, stay in the dtype of the files.

    Args:
        model: after its tensors are read. Parameters without memory are passed over: transformers
            has put them on disk.
        dtypes: the result of `float_dtypes`; others are left alone.
    """
    for name, parameter in model.named_parameters():
        wanted = dtypes.get(name, parameter.dtype)
        if parameter.dtype != wanted and not parameter.is_meta:
            parameter.data = parameter.data.to(wanted)
