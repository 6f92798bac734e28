"""The grid on which the keys or the values of a block are rounded and packed, head by head."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from quantine.core.grid import decode, encode
from quantine.kernels import backend
from quantine.kernels.bits.reference import pack_reference, packed_bytes
from quantine.kernels.kv_attention.digits import DIGIT, Digits
from quantine.kernels.kv_attention.key_centre import KeyCentre
from quantine.kernels.kv_attention.packed_states import (
    FACTOR_BYTES,
    PackedStates,
    RecordedStates,
    RowLayout,
)
from quantine.kernels.kv_attention.packing import pack_states, put_rows, round_states
from quantine.kernels.kv_attention.state_codes import head_factors, state_codes

LARGEST_WIDTH: Final = 8
"""Largest number of bits of a channel's codes, where channels differ."""


class StateGrid(NamedTuple):
    """The grid of the keys or the values of a block, head by head.

    Attributes:
        bits: number of bits of one code, 2 to 8; the mean where channels differ.
        scale, zero: ``[heads, dim]`` float32.
        feedback: as for `quantine.kernels.kv_attention.packing.pack_states`.
        widths: ``[heads, dim]`` uint8, numbers of bits of the channels where they differ, see
            `quantine.kernels.kv_attention.digits`; else ``None``.
        digits: what `widths` make of a row; else ``None``.
        reach: ``[heads]`` float32 where each token of a head is divided by a factor, see
            `quantine.kernels.kv_attention.state_codes.head_factors`; else ``None``. There is
            neither ``feedback`` nor ``widths`` then.
        centre: what keys are less by before they are rounded here, and what is added to what codes
            stand for; else ``None``.
    """

    bits: int
    scale: Tensor
    zero: Tensor
    feedback: Tensor | None = None
    widths: Tensor | None = None
    digits: Digits | None = None
    reach: Tensor | None = None
    centre: KeyCentre | None = None

    @classmethod
    def uneven(
        cls, bits: int, scale: Tensor, zero: Tensor, feedback: Tensor | None, widths: Tensor
    ) -> StateGrid:
        """A grid of channels with different numbers of bits; arguments are the attributes."""
        digits = Digits.of(widths, scale.shape[1] * bits // DIGIT)
        return cls(bits, scale, zero, feedback, widths, digits)

    @property
    def row(self) -> int:
        """Bytes of a token of a head."""
        dim = self.scale.shape[1]
        if self.digits is not None:
            return packed_bytes(self.digits.place.shape[1], DIGIT)
        codes = packed_bytes(dim, self.bits)
        return codes if self.reach is None else codes + FACTOR_BYTES

    @property
    def rows(self) -> RowLayout:
        """What a row of a token is, besides codes of ``bits`` bits."""
        return RowLayout(self.digits, self.reach is not None, self.centre)

    def pack(self, states: Tensor, packed: Tensor, start: Tensor | None = None) -> None:
        """Round ``states`` into ``packed``: see `quantine.kernels.kv_attention.packing`."""
        if self.widths is None and self.reach is None:
            pack_states(states, self.bits, self.scale, self.zero, packed, self.feedback, start)
            return
        rows = self._rows(states)
        if start is None:
            packed.copy_(rows)
        else:
            put_rows(rows, packed, start)

    def states(self, packed: Tensor, dtype: torch.dtype) -> PackedStates | RecordedStates:
        """What ``packed`` stands for; while PyTorch compiles, in a form that it can compile."""
        kind = RecordedStates if backend.is_compiled() else PackedStates
        return kind(packed, self.bits, self.scale, self.zero, dtype, self.rows)

    def rounded(self, x: Tensor) -> Tensor:
        """What the codes of ``x`` ``[n, heads, dim]`` stand for, float32 of the same shape."""
        if self.reach is not None:
            floats = x.float()
            factor = head_factors(floats, self.scale, self.zero, self.bits, self.reach)
            codes = encode(floats / factor, self.scale, self.zero, self.bits)
            return decode(codes, self.scale, self.zero).mul_(factor)
        states = x.transpose(0, 1).unsqueeze(0)
        if self.widths is not None:
            codes = state_codes(states, self.scale, self.zero, self.feedback, self.widths)
            found = decode(codes, self.scale.unsqueeze(1), self.zero.unsqueeze(1))
        else:
            assert self.feedback is not None
            found = round_states(states, self.bits, self.scale, self.zero, self.feedback)
        return found.squeeze(0).transpose(0, 1).contiguous()

    def _rows(self, states: Tensor) -> Tensor:
        """The bytes of ``states``, ``[batch, heads, tokens, row]`` uint8."""
        if self.digits is not None:
            assert self.widths is not None
            codes = state_codes(states, self.scale, self.zero, self.feedback, self.widths)
            return _packed(self.digits.split(codes), DIGIT)
        assert self.reach is not None
        floats = states.detach().float().transpose(1, 2)
        factor = head_factors(floats, self.scale, self.zero, self.bits, self.reach)
        codes = encode(floats / factor, self.scale, self.zero, self.bits).byte()
        tail = factor.half().view(torch.uint8).transpose(1, 2)
        return torch.cat([_packed(codes.transpose(1, 2), self.bits), tail], 3)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """``codes`` ``[batch, heads, tokens, n]`` uint8 as rows of bytes."""
    rows = pack_reference(codes.reshape(-1, codes.shape[3]), bits)
    return rows.view(*codes.shape[:3], rows.shape[1])
