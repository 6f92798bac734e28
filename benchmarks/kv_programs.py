"""Programs for packed keys and values, as benchmarks/gpu_compile.py compiles them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quantine.kernels.bits.reference import packed_bytes
from quantine.kernels.kv_attention.packed_states import PackedStates
from quantine.kernels.kv_attention.scoring import Scoring
from quantine.kernels.kv_attention.triton import joining, packing, seen
from quantine.kernels.kv_attention.triton.request import Parts, Request, launch_of

HEADS = 2
"""Heads of keys: programs do not depend on how many there are."""


@dataclass(frozen=True)
class Attention:
    """Attention to compile.

    Attributes:
        bits: of one code.
        dim: channels of a head.
        copies: heads of queries that share a head of keys.
        tokens: of queries.
        context: tokens of keys; from two parts on, the context is split.
        softmax_bits: bits of probabilities; 16 does not round them.
    """

    bits: int
    dim: int
    copies: int
    tokens: int
    context: int
    softmax_bits: int = 16

    @property
    def name(self) -> str:
        rounded = "" if self.softmax_bits == 16 else f", {self.softmax_bits}-bit probabilities"
        return (
            f"attention, {self.bits} bits{rounded}; {self.dim} channels, {self.copies} heads to "
            f"one, {self.tokens} token{'s' * (self.tokens > 1)}"
        )

    def request(self) -> Request:
        """What it computes."""
        shape = (1, HEADS, self.context, packed_bytes(self.dim, self.bits))
        grid = torch.ones(HEADS, self.dim)
        packed = torch.zeros(shape, dtype=torch.uint8)
        states = PackedStates(packed, self.bits, grid, grid, torch.float16)
        query = torch.zeros(1, HEADS * self.copies, self.tokens, self.dim, dtype=torch.float16)
        mask = torch.zeros(1, 1, self.tokens, self.context, dtype=torch.float16)
        ends = torch.zeros(2, 1, 1, self.tokens, 4, dtype=torch.int32)
        return Request(
            query,
            states,
            states,
            Scoring(0.1, None, self.softmax_bits),
            mask.expand(-1, HEADS * self.copies, -1, -1),
            ends.expand(-1, -1, HEADS * self.copies, -1, -1),
        )

    def launch(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """What `quantine.kernels.kv_attention.triton.request.launch_of` says of it."""
        request, known = self.request(), None
        if request.top:
            known = (torch.zeros(request.query.shape[:3]),) * 2
        if request.parts > 1:
            return launch_of(request, known, None, Parts.empty(request, mixed=True), None)
        return launch_of(request, known, None, None, out_of(request))


def out_of(request: Request) -> torch.Tensor:
    batch, heads, tokens, dim = request.query.shape
    return request.query.new_empty(batch, tokens, heads, dim)


@dataclass(frozen=True)
class Joining:
    """The parts of the context of attention, joined, to compile."""

    attention: Attention

    @property
    def name(self) -> str:
        attention = self.attention
        return f"joining {attention.request().parts} parts; {attention.dim} channels"

    def launch(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """What `quantine.kernels.kv_attention.triton.joining.launch_of` says of it."""
        request = self.attention.request()
        return joining.launch_of(request, Parts.empty(request, mixed=True), out_of(request))


@dataclass(frozen=True)
class Looking:
    """What queries see of the context by a mask in float16, to compile."""

    tokens: int
    context: int

    @property
    def name(self) -> str:
        return f"looking at a mask; {self.tokens} token{'s' * (self.tokens > 1)}"

    def launch(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """What `quantine.kernels.kv_attention.triton.seen.launch_of` says of it."""
        mask = torch.zeros(1, 1, self.tokens, self.context, dtype=torch.float16)
        chunks = -(-self.context // seen.CHUNK)
        ends = torch.zeros(2, 1, 1, self.tokens, chunks, dtype=torch.int32)
        return seen.launch_of(mask, self.context, ends)


@dataclass(frozen=True)
class Rounding:
    """Rounding of the keys or values of one token to compile: bits, channels, error feedback.

    Where the place ``is_read`` on the device, there is room for all tokens.
    """

    bits: int
    dim: int
    fed: bool
    is_read: bool = False

    @property
    def name(self) -> str:
        fed = ", with feedback" if self.fed else ""
        place = ", its place read" if self.is_read else ""
        return f"rounding of keys, {self.bits} bits{fed}; {self.dim} channels, 1 token{place}"

    def launch(self) -> tuple[Any, list[Any], dict[str, Any]]:
        """What `quantine.kernels.kv_attention.triton.packing.launch_of` says of it."""
        grid = torch.ones(HEADS, self.dim)
        room, start = (4096, torch.tensor(0)) if self.is_read else (1, None)
        packed = torch.zeros(1, HEADS, room, packed_bytes(self.dim, self.bits), dtype=torch.uint8)
        feedback = torch.zeros(HEADS, self.dim, self.dim).half() if self.fed else None
        states = torch.zeros(1, HEADS, 1, self.dim, dtype=torch.float16)
        return packing.launch_of(states, self.bits, grid, grid, packed, feedback, start)


KV_PROGRAMS: tuple[Attention | Joining | Looking | Rounding, ...] = (
    Attention(4, 128, 4, 1, 4096),
    Attention(3, 128, 4, 1, 4096),
    Attention(5, 128, 4, 1, 4096),
    Attention(7, 128, 4, 1, 4096),
    Attention(8, 128, 4, 1, 4096),
    Attention(4, 64, 1, 1, 4096),
    Attention(4, 128, 4, 1, 4096, 8),
    Attention(4, 256, 2, 1, 4096),
    Attention(4, 128, 4, 4096, 4096),
    Attention(3, 128, 4, 4096, 4096),
    Attention(4, 256, 2, 4096, 4096),
    Attention(8, 256, 1, 4096, 4096),
    Attention(8, 256, 4, 4096, 4096),
    Rounding(4, 128, True),
    Rounding(3, 128, False),
    Rounding(4, 128, False, is_read=True),
    Joining(Attention(4, 128, 4, 1, 4096)),
    Joining(Attention(4, 256, 2, 1, 2**16)),
    Looking(1, 4096),
    Looking(4096, 4096),
)
