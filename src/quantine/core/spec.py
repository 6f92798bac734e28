"""`QuantSpec`, which says on what grid one weight matrix is to be quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from quantine.errors import PlanError, shown

GroupAxis = Literal["in", "out"]
"""Name of an axis along which groups extend, one of `GROUP_AXES`."""
GROUP_AXES: Final[tuple[GroupAxis, ...]] = ("in", "out")
"""Values of `QuantSpec.group_axis`: the axis of a matrix ``[out, in]`` along which a group
extends."""
StatAxis = Literal["lines", "groups"]
"""Name of what shares a second grid, one of `STAT_AXES`."""
STAT_AXES: Final[tuple[StatAxis, ...]] = ("lines", "groups")
"""Values of `QuantSpec.stat_axis`: a second grid holds the statistics of consecutive lines, or of
consecutive groups of one line."""

MIN_BITS: Final = 2
"""Smallest number of bits of one code."""
MAX_BITS: Final = 8
"""Largest number of bits of one code; codes are handled as uint8."""
FLOAT16: Final = 16
"""Number of bits that stands for a scale or zero point stored in float16 instead of as a code."""
WHOLE_ROW: Final = -1
"""Size that stands for "all": a group of the whole line, or one second grid for the statistics of
all lines."""
MOST_WEIGHTS: Final = 2**31 - 1
"""Largest group, and most lines that a second grid spans: native code adds to such numbers."""
CLUSTERS: Final = 0
"""Group size that stands for groups as large as the clusters of the matrix's input channels (RPTQ,
arXiv 2304.01089)."""
RARE: Final = ("cluster_sizes", "signed", "minimum", "stat_axis")
"""Fields of `QuantSpec` that few grids have: plain values have them only where they say more than
their defaults."""


@dataclass(frozen=True)
class QuantSpec:
    """The grid on which one weight matrix ``[out, in]`` is to be quantized.

    Groups lie within the matrix's *lines*: its rows, or its columns where groups run along outputs
    (per input channel: AdaDim, arXiv 2309.15531). A grid over columns is that over the rows of the
    transposed matrix.

    Attributes:
        bits: number of bits of one code, 2 to 8.
        group_size: number of consecutive weights of one line that share a scale and a zero point.
            -1 means the whole line (per channel), 0 the clusters of the matrix's inputs.
        sym: whether the grid is symmetric: the zero point is the middle code and is not stored.
        scale_bits: 16 stores scales in float16; 2 to 8 stores them as codes of that many bits on a
            second grid (SpQR, arXiv 2306.03078, section 4.2).
        zero_bits: 0 means integer zero points in the code range, stored in ``bits`` bits. Otherwise
            zero points may be fractions and lie anywhere: 16 stores them in float16, 2 to 8 as
            codes of a second grid.
        stat_group_size: number of consecutive lines whose scales (and whose zero points), for
            groups at the same place in their lines, share a second grid; the last run may be
            shorter. -1 means all lines.
        group_axis: ``"in"``: lines are rows, a group holds inputs of one output. ``"out"``: lines
            are columns, a group holds outputs of one input.
        cluster_sizes: number of inputs of each cluster, where groups are clusters; empty until they
            are known.
        signed: whether scales may be negative, for symmetric grids only: codes reach one step
            farther to one side, and so that side may be either.
        minimum: whether a weight is ``scale * code - minimum`` instead of ``scale * (code -
            zero)``; minima are stored in ``zero_bits`` bits.
        stat_axis: ``"groups"``: a second grid holds the statistics of ``stat_group_size``
            consecutive groups of one line, as multiples of one float16: from 0 on, or in symmetric
            grids around 0. Coded minima are then not negative.

    Raises:
        PlanError: a field has a value that is not allowed, or fields exclude each other.
    """

    bits: int = 4
    group_size: int = 64
    sym: bool = False
    scale_bits: int = FLOAT16
    zero_bits: int = 0
    stat_group_size: int = 16
    group_axis: GroupAxis = "in"
    cluster_sizes: tuple[int, ...] = ()
    signed: bool = False
    minimum: bool = False
    stat_axis: StatAxis = "lines"

    def __post_init__(self) -> None:
        for name in ("bits", "group_size", "scale_bits", "zero_bits", "stat_group_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise PlanError(f"{name} must be a whole number, not {shown(value)}")
        for name in ("sym", "signed", "minimum"):
            if not isinstance(getattr(self, name), bool):
                raise PlanError(f"{name} must be true or false, not {shown(getattr(self, name))}")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise PlanError(f"bits must be {MIN_BITS} to {MAX_BITS}, not {shown(self.bits)}")
        check_choice("group_axis", self.group_axis, GROUP_AXES)
        check_choice("stat_axis", self.stat_axis, STAT_AXES)
        for name, whole in (("group_size", "the whole line"), ("stat_group_size", "all lines")):
            value = getattr(self, name)
            clusters = name == "group_size" and value == CLUSTERS
            if value != WHOLE_ROW and value < 1 and not clusters:
                raise PlanError(f"{name} must be positive, or -1 for {whole}, not {shown(value)}")
            if value > MOST_WEIGHTS:
                raise PlanError(f"{name} must be at most {MOST_WEIGHTS}, not {shown(value)}")
        widths = f"{MIN_BITS} to {MAX_BITS}, or {FLOAT16}"
        if not (MIN_BITS <= self.scale_bits <= MAX_BITS or self.scale_bits == FLOAT16):
            raise PlanError(f"scale_bits must be {widths}, not {shown(self.scale_bits)}")
        if not (MIN_BITS <= self.zero_bits <= MAX_BITS or self.zero_bits in {0, FLOAT16}):
            raise PlanError(f"zero_bits must be 0, {widths}, not {shown(self.zero_bits)}")
        if self.sym and self.zero_bits:
            raise PlanError(
                f"zero_bits {self.zero_bits} and sym exclude each other: a symmetric grid has no "
                "zero points to store"
            )
        if self.clustered and (self.group_axis == "out" or self.zero_bits or self.second_level):
            raise PlanError(
                f"group_size {CLUSTERS} (clusters of inputs) needs group_axis in, scale_bits "
                f"{FLOAT16} and zero_bits 0: leave them out"
            )
        if self.blocked or self.stat_axis == "groups":
            self._check_blocked()

    def _check_blocked(self) -> None:
        """Refuse signs, minima and second grids along a line where they say nothing together."""
        coded = {MIN_BITS <= self.scale_bits <= MAX_BITS}
        if self.minimum:
            coded.add(MIN_BITS <= self.zero_bits <= MAX_BITS)
        if self.signed and not self.sym:
            raise PlanError("signed is for symmetric grids: add sym, or leave it out")
        if self.minimum and not self.zero_bits:
            raise PlanError(f"minimum needs zero_bits {MIN_BITS} to {MAX_BITS}, or {FLOAT16}")
        if not self.blocked or coded != {self.stat_axis == "groups"}:
            raise PlanError(
                "stat_axis groups belongs to scales (and minima) of 2 to 8 bits in grids that are "
                "signed, or have minima"
            )
        if self.group_axis == "out" or self.clustered:
            raise PlanError(
                "signed and minimum need group_axis in and a group_size: leave them out"
            )

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values; those in `RARE` only where they are not the default."""
        fields = dataclasses.asdict(self)
        usual = {name for name in RARE if fields[name] == getattr(QuantSpec, name)}
        return {name: value for name, value in fields.items() if name not in usual}

    @property
    def blocked(self) -> bool:
        """Whether scales have signs or minima are free, as in the blocks of GGUF files."""
        return self.signed or self.minimum

    @property
    def clustered(self) -> bool:
        """Whether groups are the clusters of the matrix's inputs."""
        return self.group_size == CLUSTERS

    @property
    def second_level(self) -> bool:
        """Whether scales or zero points are stored as codes of a second grid."""
        return MIN_BITS <= self.scale_bits <= MAX_BITS or MIN_BITS <= self.zero_bits <= MAX_BITS

    def lines(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Number and length of the lines of a matrix ``[out_features, in_features]``."""
        along_inputs = self.group_axis == "in"
        return (out_features, in_features) if along_inputs else (in_features, out_features)

    def groups(self, length: int) -> int:
        """Number of groups in a line of ``length`` weights."""
        return len(self.cluster_sizes) or length // self.group_length(length)

    def group_length(self, length: int) -> int:
        """Number of weights per group of a line of ``length``; 0 where groups are clusters."""
        return length if self.group_size == WHOLE_ROW else self.group_size

    def stat_group_length(self, lines: int) -> int:
        """Number of lines that share a second grid, in a matrix of ``lines`` lines."""
        return lines if self.stat_group_size == WHOLE_ROW else self.stat_group_size

    def divides(self, length: int) -> bool:
        """Whether a line of ``length`` weights consists of whole groups; true for clusters."""
        return self.clustered or length % self.group_length(length) == 0


def nearest_group_sizes(length: int, group_size: int, count: int = 3) -> list[int]:
    """The ``count`` divisors of ``length`` nearest to ``group_size``, in ascending order."""
    divisors = [d for d in range(1, length + 1) if length % d == 0]
    return sorted(sorted(divisors, key=lambda d: abs(d - group_size))[:count])


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that the ``value`` of the field ``name`` is one of ``choices``.

    Raises:
        PlanError: it is not; the message names the choices.
    """
    if value not in choices:
        raise PlanError(f"{name} must be one of {', '.join(choices)}, not {shown(value)}")
