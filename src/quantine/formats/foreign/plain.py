"""Matrices as other engines know them: codes, scales in 16 bit, whole zero points, no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantine.core.grid import Grid
from quantine.core.permute import inverse
from quantine.core.qtensor import QTensor
from quantine.core.spec import CLUSTERS, FLOAT16, QuantSpec
from quantine.errors import FormatError, PlanError, shown
from quantine.formats.foreign.target import Matrix


def plain_refusal(matrix: Matrix) -> str | None:
    """Why a matrix has more than codes, scales in 16 bit and whole zero points along inputs."""
    spec = matrix.spec
    if spec.blocked:
        return "its scales have signs or its minima are free, as only GGUF files have them"
    if matrix.outliers:
        return "it may have outliers, for which there is no room"
    if spec.group_axis == "out":
        return "its groups run along outputs"
    if spec.clustered:
        return "its groups are clusters of inputs, which differ in size"
    if spec.scale_bits != FLOAT16:
        return "its scales are codes of second grids"
    if spec.zero_bits:
        return "its zero points are fractions"
    return None


def plain_spec(bits: int, group_size: int, sym: bool) -> QuantSpec:
    """The grid that the settings of another engine say.

    Raises:
        PlanError: there is no such grid, or groups have no size.
    """
    if group_size == CLUSTERS:  # which only quantine has
        raise PlanError(f"group_size must be positive, or -1 for the whole line, not {CLUSTERS}")
    return QuantSpec(bits, group_size, sym)


def names_in(settings: Mapping[str, Any], field: str) -> list[str]:
    """The list of names that a field of ``settings`` holds; empty where it is missing or null.

    Raises:
        FormatError: it holds something else.
    """
    found = settings.get(field)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise FormatError(f"{field} in quantization_config is no list of names: {shown(found)}")
    return found


@dataclass(frozen=True)
class Plain:
    """A matrix whose weights are ``scale * (code - zero)``, columns in input order.

    Attributes:
        codes: ``[out, in]`` uint8.
        scale: ``[out, groups]`` float16, positive; other floats where another engine stored them,
            which `qtensor_of` refuses unless float16 holds them.
        zero: ``[out, groups]`` uint8, in the range of the codes.
        bits: of a code.
        group_of: ``[in]`` int32, the group of each input; ``None`` where groups are consecutive
            inputs.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group_of: Tensor | None = None

    @property
    def group_size(self) -> int:
        """Number of inputs of a group."""
        return self.codes.shape[1] // self.scale.shape[1]

    def by_weight(self) -> tuple[Tensor, Tensor]:
        """Scale, as it is stored, and zero point (int16) of every weight, ``[out, in]``."""
        if self.group_of is None:
            size = self.group_size
            return (
                self.scale.repeat_interleave(size, 1),
                self.zero.to(torch.int16).repeat_interleave(size, 1),
            )
        group = self.group_of.long()
        return self.scale[:, group], self.zero.to(torch.int16)[:, group]

    def decoded(self) -> Tensor:
        """The weights, ``[out, in]`` float32."""
        scale, zero = self.by_weight()
        return (self.codes.to(torch.int16) - zero).float().mul_(scale.float())


def plain(name: str, qtensor: QTensor) -> Plain:
    """The matrix of layer ``name``, which `plain_refusal` does not refuse, in that form.

    Raises:
        FormatError: its scales are too small for float16.
    """
    grid = qtensor.grid
    assert isinstance(grid.scale, Tensor)
    assert qtensor.outliers is None or not qtensor.outliers.entries
    scale = short_scales(name, grid)
    zero = grid.zeros().to(torch.uint8)
    codes, group_of = qtensor.codes, None
    if qtensor.in_perm is not None:
        back = inverse(qtensor.in_perm)
        codes = codes[:, back]
        if scale.shape[1] > 1:
            group_of = (back // grid.group_size).to(torch.int32)
    return Plain(codes.contiguous(), scale, zero, grid.bits, group_of)


def short_scales(name: str, grid: Grid) -> Tensor:
    """The scales of layer ``name`` in float16, exponent included.

    Raises:
        FormatError: float16 does not hold them.
    """
    exact = grid.scales()
    scale = exact.half()
    if not torch.equal(scale.float(), exact):
        raise FormatError(
            f"{name} has scales down to {exact.min().item():.2g}, which float16 does not hold: "
            "its weights are too small for other engines; export --to float"
        )
    return scale.contiguous()


def qtensor_of(name: str, matrix: Plain, sym: bool) -> QTensor:
    """Invert `plain`: groups that are not consecutive become an order of stored columns.

    Args:
        name: of the layer, for messages.
        matrix: the matrix; its scales may be floats of any dtype.
        sym: whether all zero points are the middle code, which is then not stored.

    Raises:
        FormatError: float16, of which scales of quantine's grids are, does not hold them.
    """
    scale = matrix.scale.half()
    if not bool((scale.float() == matrix.scale.float()).all()) or not bool((scale > 0).all()):
        raise FormatError(
            f"{name} has scales that float16 does not hold: quantize from it as a source of "
            "floats instead"
        )
    codes, in_perm = matrix.codes, None
    if matrix.group_of is not None:
        in_perm = matrix.group_of.long().argsort(stable=True)
        codes = codes[:, in_perm].contiguous()
    zero = None if sym else matrix.zero
    return QTensor(codes, Grid(scale, zero, matrix.bits, matrix.group_size), in_perm)


def group_text(spec: QuantSpec) -> str:
    """``spec`` in the words of messages."""
    size = "whole rows" if spec.group_size == -1 else f"groups of {spec.group_size}"
    return f"{spec.bits} bits, {'sym' if spec.sym else 'asym'}, {size}"
