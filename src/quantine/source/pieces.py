"""Tensors of a model that files may store as parts of larger ones, such as those of experts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol

from torch import Tensor, nn

from quantine.errors import CheckpointError

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter

MERGES: Final = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
"""Operations of transformers, with their dimensions, that make a fused parameter of tensors of
single experts: a list of them becomes one of more dimensions; then several of these, with gates and
ups, become one."""
JOINS: Final = [("Concatenate", 0)]
"""Operations that make one tensor of several, such as one convolution of those of queries, keys and
values."""
NUMBER: Final = re.compile(r"\.(\d+)\.")
"""Where the number of an expert, or of a block, is in the name of a tensor."""


class Piece(Protocol):
    """A part of a larger tensor, as `quantine.families.experts.Piece` describes it."""

    @property
    def parameter(self) -> str:
        """Name of the larger tensor."""
        ...

    @property
    def expert(self) -> int:
        """Place of the part in the first dimension."""
        ...

    @property
    def is_plain(self) -> bool:
        """Whether the part lies in the larger tensor as transformers merges it: not transposed."""
        ...

    def of(self, fused: Tensor) -> Tensor:
        """The part of ``fused``, all that is at the place in the first dimension."""
        ...


def pieces_of(model: nn.Module) -> dict[str, dict[str, Piece]]:
    """The parts of each larger tensor that a model's files may hold, by names, in their order.

    Args:
        model: whose modules say what they store so by a method ``pieces``, and by a method ``room``
            what else is in the larger tensors, of which the model has nothing.
    """
    found: dict[str, dict[str, Piece]] = {}
    for path, module in model.named_modules():
        for name, piece in _said(module):
            found.setdefault(f"{path}.{piece.parameter}", {})[f"{path}.{name}"] = piece
    return found


def _said(module: Any) -> Iterator[tuple[str, Piece]]:
    if hasattr(module, "pieces"):
        yield from module.pieces()
        yield from module.room()


def piece_stored_as(
    old: str, pattern: str, converter: WeightConverter, pieces: dict[str, Piece]
) -> str:
    """Which of ``pieces`` files hold as a tensor of its own.

    Args:
        old: its name in the files.
        pattern: that of the names in ``converter`` which it matched.
        converter: what transformers makes the larger tensor with.
        pieces: the parts of the larger tensor, by their names in the model.

    Raises:
        CheckpointError: ``converter`` does more than to put such tensors beside each other.
    """
    operations = [(type(one).__name__, getattr(one, "dim", 0)) for one in converter.operations]
    numbers = NUMBER.findall(old)
    of_expert = [
        name for name, piece in pieces.items() if numbers and piece.expert == int(numbers[-1])
    ]
    plain = all(piece.is_plain for piece in pieces.values()) and ".*." in pattern
    if operations not in MERGES or not plain or len(of_expert) != len(converter.source_patterns):
        raise in_another_layout(old)
    return of_expert[converter.source_patterns.index(pattern)]


class Join:
    """A tensor of a model that files hold in parts, which follow each other in its first dimension.

    Args:
        name: what the model calls it.
        converter: what transformers makes it with.
    """

    def __init__(self, name: str, converter: WeightConverter) -> None:
        self._name, self._converter = name, converter
        self._found: dict[str, str] = {}

    def add(self, old: str, pattern: str) -> None:
        """Take a stored tensor for the part whose names in the converter are ``pattern``.

        Raises:
            CheckpointError: the converter does more than to join such parts; or there are two.
        """
        operations = [
            (type(one).__name__, getattr(one, "dim", 0)) for one in self._converter.operations
        ]
        if operations != JOINS or "*" in pattern:
            raise in_another_layout(old)
        if pattern in self._found:
            raise there_twice(self._name, self._found[pattern], old)
        self._found[pattern] = old

    def parts(self) -> tuple[str, ...]:
        """Names of all parts in the files, in their order.

        Raises:
            CheckpointError: one is missing.
        """
        for pattern in self._converter.source_patterns:
            if pattern not in self._found:
                raise CheckpointError(
                    f"{self._name} lacks a part: no file holds what ends with {pattern}, beside "
                    f"{next(iter(self._found.values()))}; the download may be incomplete"
                )
        return tuple(self._found[pattern] for pattern in self._converter.source_patterns)


def there_twice(name: str, one: str, other: str) -> CheckpointError:
    """The error for two stored tensors that are the same one of the model."""
    return CheckpointError(
        f"{name} is there twice, as {one} and as {other}: which one counts is open"
    )


def in_another_layout(old: str) -> CheckpointError:
    """The error for the stored tensor ``old``, of which it is not known how it lies."""
    return CheckpointError(
        f"{old} is stored in another layout than the model's: load the model with transformers and "
        "save it again"
    )
