"""Keys and values of attention as packed codes, in tensors that behave like floats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from quantine.core.grid import decode
from quantine.kernels.bits import unpack
from quantine.kernels.bits.reference import packed_bytes
from quantine.kernels.kv_attention.digits import DIGIT, Digits
from quantine.kernels.kv_attention.key_centre import KeyCentre

FACTOR_BYTES: Final = 2
"""Bytes of the factor of a token, a float16, behind its codes."""


class RowLayout(NamedTuple):
    """What the rows of packed keys or values are, besides codes of the same number of bits.

    Attributes:
        digits: where the codes of channels are that have different numbers of bits; else ``None``.
        factors: whether a factor of the token follows, by which what codes stand for is multiplied.
        centre: what is added to what codes stand for, where the first row is of position 0; else
            ``None``.
    """

    digits: Digits | None = None
    factors: bool = False
    centre: KeyCentre | None = None

    @property
    def is_plain(self) -> bool:
        """Whether rows are nothing else, so that kernels multiply them."""
        return self.digits is None and not self.factors and self.centre is None


PLAIN: Final = RowLayout()
"""Codes of the same number of bits and nothing else."""


class PackedStates(Tensor):
    """Packed keys or values, with the shape and dtype of the floats they stand for.

    quantine's attention reads the codes. Any operation of PyTorch gets the decoded floats instead,
    so other attention functions work with them as well.

    Args:
        packed: ``[batch, heads, tokens, bytes]`` uint8: the codes of one head and token in a row,
            in the layout of `quantine.kernels.bits.reference`.
        bits: number of bits of one code, 2 to 8.
        scale, zero: ``[heads, dim]`` float32: a code ``c`` stands for ``scale * (c - zero)``.
        dtype: float dtype that the tensor shows and decodes to.
        rows: what rows are, besides codes.
    """

    packed: Tensor
    bits: int
    scale: Tensor
    zero: Tensor
    rows: RowLayout

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        bits: int,
        scale: Tensor,
        zero: Tensor,
        dtype: torch.dtype,
        rows: RowLayout = PLAIN,
    ) -> PackedStates:
        """A tensor ``[batch, heads, tokens, dim]`` without memory; `__init__` adds the codes."""
        shape = (*packed.shape[:3], scale.shape[1])
        made: PackedStates = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=packed.device
        )
        return made

    def __init__(
        self,
        packed: Tensor,
        bits: int,
        scale: Tensor,
        zero: Tensor,
        dtype: torch.dtype,
        rows: RowLayout = PLAIN,
    ) -> None:
        self.packed, self.bits, self.scale, self.zero = packed, bits, scale, zero
        self.rows = rows

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors inside: packed codes, scales, zero points."""
        return self.packed, self.scale, self.zero

    def decoded(self) -> Tensor:
        """The floats that the codes stand for, ``[batch, heads, tokens, dim]`` of this dtype."""
        return _decoded(self)

    # Functions of PyTorch keep their results as they are: floats.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call PyTorch's ``func`` with decoded floats in place of packed states."""
        args, kwargs = tree_map_only(cls, cls.decoded, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class RecordedStates:
    """What stands for `PackedStates` while PyTorch compiles, which cannot make such a tensor.

    Only quantine's attention reads it. Attributes are those of `PackedStates`.
    """

    packed: Tensor
    bits: int
    scale: Tensor
    zero: Tensor
    dtype: torch.dtype
    rows: RowLayout = PLAIN

    @property
    def shape(self) -> torch.Size:
        """``[batch, heads, tokens, dim]``."""
        return torch.Size((*self.packed.shape[:3], self.scale.shape[1]))

    def decoded(self) -> Tensor:
        """The floats that the codes stand for, ``[batch, heads, tokens, dim]`` of this dtype."""
        return _decoded(self)


def _decoded(states: PackedStates | RecordedStates) -> Tensor:
    dim, (digits, factors, centre) = states.shape[3], states.rows
    if digits is None:
        codes = _codes(states.packed, states.bits, dim)
    else:
        codes = digits.joined(_codes(states.packed, DIGIT, digits.place.shape[1]), dim)
    floats = decode(codes, states.scale.unsqueeze(1), states.zero.unsqueeze(1))
    if factors:
        # A copy, as a view of another dtype has to begin at a multiple of its size.
        tail = states.packed[..., -FACTOR_BYTES:].clone(memory_format=torch.contiguous_format)
        floats *= tail.view(torch.float16)
    if centre is not None:
        positions = torch.arange(states.shape[2], device=floats.device)
        floats += centre.at(positions).transpose(0, 1)
    return floats.to(states.dtype)


def _codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of each row, ``[batch, heads, tokens, count]`` uint8."""
    rows = packed[..., : packed_bytes(count, bits)]
    codes: Tensor = unpack(rows.reshape(-1, rows.shape[3]), bits, count)
    return codes.view(*packed.shape[:3], count)
