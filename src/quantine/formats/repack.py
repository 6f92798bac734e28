"""Packing a matrix that one layout held in another one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantine.core.qtensor import QTensor
from quantine.core.spec import QuantSpec
from quantine.errors import FormatError
from quantine.families.family import Family
from quantine.formats import format_named


def check_repackable(
    name: str, layout_name: str, biased: bool, rounded: bool, family: Family
) -> None:
    """Refuse a layout that is never written, or whose readers would misread layer ``name``.

    Args:
        layout_name: a row of `quantine.formats.FORMATS`.
        biased: whether the layer has a bias.
        rounded: whether activations of the model are rounded.
        family: of the model.

    Raises:
        FormatError: names the layer and the remedy.
    """
    layout = format_named(layout_name)
    if not layout.writable:
        raise FormatError(
            f"{name}: format {layout_name} is only read, never written: use another one"
        )
    if layout.linears_only and not name.startswith(f"{family.blocks}."):
        raise FormatError(
            f"{name} is outside of the decoder blocks, but format {layout_name} holds only "
            "Linear layers inside of them: use format sparse"
        )
    if layout.exclusive and rounded:
        raise FormatError(
            f"{name} is in a model with rounded activations, which the other readers of format "
            f"{layout_name} do not round: use format sparse"
        )
    if biased and not layout.holds_bias:
        raise FormatError(
            f"{name} has a bias, which the other readers of format {layout_name} drop: use "
            "format sparse"
        )


def repack(
    name: str, qtensor: QTensor, spec: QuantSpec, layout_name: str, round_outliers: bool
) -> dict[str, Tensor]:
    """The tensors of a matrix in a layout, by their names in it.

    Args:
        name: of the layer, for errors.
        qtensor: as another layout held it.
        spec: that it was made for.
        layout_name: a row of `quantine.formats.FORMATS`.
        round_outliers: round outliers to float16 before.

    Raises:
        FormatError: names the layer, what the layout cannot hold of it, and the remedy.
    """
    layout = format_named(layout_name)
    qtensor = _with_short_outliers(name, qtensor, round_outliers)
    held = qtensor.outliers is not None
    if not layout.supports(spec, held):
        outliers = " with outliers" if held else ""
        raise FormatError(
            f"{name}: format {layout_name} has no room for {spec}{outliers}: use format sparse"
        )
    reason = layout.refusal(spec, qtensor.codes.shape[0], qtensor.codes.shape[1])
    if reason is not None:
        raise FormatError(f"{name}: {reason}")
    try:
        return layout.pack(qtensor)
    except FormatError as error:
        hint = (
            "" if round_outliers or not held else " (or let outliers be rounded to float16 first)"
        )
        raise FormatError(
            f"{name} cannot be packed in format {layout_name}: {error}{hint}"
        ) from error


def _with_short_outliers(name: str, qtensor: QTensor, rounds: bool) -> QTensor:
    """``qtensor`` with outliers in float16, where that loses nothing or ``rounds`` allows it.

    No outliers are ``None``, however they were stored.
    """
    outliers = qtensor.outliers
    if outliers is None or not outliers.entries:
        return replace(qtensor, outliers=None)
    exponent = qtensor.grid.exponent
    short = (outliers.values.float() * 2.0**-exponent).half()
    if rounds and not bool(torch.isfinite(short).all()):
        raise FormatError(
            f"{name} has an outlier of {outliers.values.abs().max().item():.4g}, which float16 "
            "does not hold: keep its format"
        )
    held = short.float() * 2.0**exponent if exponent else short
    if rounds or torch.equal(held.to(outliers.values.dtype), outliers.values):
        return replace(qtensor, outliers=replace(outliers, values=held))
    return qtensor
