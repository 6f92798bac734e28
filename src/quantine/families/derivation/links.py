"""Reorders that a block may allow, by what wrote the inputs of its matrices, before any proof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from quantine.families.derivation.trace import Input, Trace
from quantine.families.experts import experts_in
from quantine.families.family import Link, Rows
from quantine.families.heads import Heads

ROWS: Final[tuple[Rows, ...]] = ("last", "interleaved")
"""Where values may stand in a matrix that has other rows, too."""


@dataclass(frozen=True)
class Reading:
    """The matrices of a block that read one tensor.

    Attributes:
        paths: those that can be quantized, in running order.
        outputs: number of outputs of each.
        width: number of channels of the tensor.
        writer: path of the module that wrote it; empty where that is not one of the block.
    """

    paths: tuple[str, ...]
    outputs: tuple[int, ...]
    width: int
    writer: str

    def beside(self, path: str) -> Reading:
        """Those of the matrices that are in the same module as ``path``."""
        return self._of([one.rpartition(".")[0] == path.rpartition(".")[0] for one in self.paths])

    def fitting(self, width: int) -> Reading:
        """Those of the matrices whose outputs are so many channels, or a multiple of them."""
        return self._of([count % width == 0 for count in self.outputs])

    def single(self) -> Iterator[Reading]:
        """Each of the matrices alone, the last one first."""
        for path in reversed(self.paths):
            yield self._of([one == path for one in self.paths])

    def _of(self, chosen: Sequence[bool]) -> Reading:
        pairs = [
            p for p, c in zip(zip(self.paths, self.outputs, strict=True), chosen, strict=True) if c
        ]
        paths, outputs = tuple(path for path, _ in pairs), tuple(count for _, count in pairs)
        return Reading(paths, outputs, self.width, self.writer)


def readings_of(
    block: nn.Module, prefix: str, kept: Mapping[str, str], trace: Trace
) -> list[Reading]:
    """What the matrices of a block read, in running order; those of experts are left out.

    Args:
        block: the block, of a small model.
        prefix: its full path.
        kept: parameters that are not quantized, by path inside of blocks.
        trace: of a forward pass.
    """
    found: dict[Input, list[tuple[str, tuple[int, int]]]] = {}
    experts = tuple(f"{path}." for path in experts_in(block))
    for product in trace.products:
        path = product.name.removeprefix(f"{prefix}.")
        inside = product.name.startswith(f"{prefix}.") and not path.startswith(experts)
        if inside and f"{path}.weight" not in kept:
            found.setdefault(product.input, []).append((path, product.shape))
    return [
        Reading(
            tuple(path for path, _ in members),
            tuple(shape[0] for _, shape in members),
            members[0][1][1],
            _writer(prefix, read, trace),
        )
        for read, members in found.items()
    ]


def _writer(prefix: str, read: Input, trace: Trace) -> str:
    name = trace.writers.get(read, "")
    return name.removeprefix(f"{prefix}.") if name.startswith(f"{prefix}.") else ""


def is_norm(block: nn.Module, reading: Reading) -> bool:
    """Whether what wrote the tensor has a weight for each channel, as norms have."""
    if not reading.writer:
        return False
    weight = getattr(block.get_submodule(reading.writer), "weight", None)
    return isinstance(weight, nn.Parameter) and weight.shape == (reading.width,)


def hidden_links(readings: Sequence[Reading], index: int) -> Iterator[Link]:
    """Ways in which the channels that reading number ``index`` reads may come from matrices.

    Each number is computed from those of one channel alone, as in an MLP behind its activation.
    """
    reading = readings[index]
    for before in reversed(readings[:index]):
        fitting = before.fitting(reading.width)
        tried: list[tuple[str, ...]] = [()]
        for few in (fitting, fitting.beside(reading.paths[0]), *fitting.single()):
            if few.paths not in tried:
                tried.append(few.paths)
                yield Link("R5", "weights", few.paths, reading.paths)


def value_links(readings: Sequence[Reading], index: int, heads: Heads) -> Iterator[Link]:
    """Ways in which the channels that reading number ``index`` reads may be attended values."""
    reading = readings[index]
    channels = reading.width // heads.copies
    for before in reversed(readings[:index]):
        for one in before.single():
            (outputs,) = one.outputs
            link = Link("R3", "weights", one.paths, reading.paths, per_head=True)
            if outputs == channels:
                yield link
            elif outputs > channels and outputs % heads.keys == 0:
                for rows in ROWS:
                    yield Link("R3", "weights", one.paths, reading.paths, True, rows)


def queries_and_keys(readings: Sequence[Reading], values: Link) -> tuple[str, ...]:
    """Paths of the matrices that write queries and keys, where these stand beside ``values``."""
    (path,) = values.producers
    if values.rows != "parts":
        return values.producers
    before = next(reading for reading in readings if path in reading.paths).beside(path).paths
    return before[: before.index(path)]
