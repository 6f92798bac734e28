"""What attention on a GPU computes, and how it is cut into programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
from torch import Tensor

from quantine.core.activation_spec import UNQUANTIZED
from quantine.kernels import backend
from quantine.kernels.kv_attention.packed_states import PackedStates
from quantine.kernels.kv_attention.scoring import Scoring
from quantine.kernels.kv_attention.triton.pieces import width_of
from quantine.kernels.kv_attention.triton.programs.attend import attend_part

MOST_ROWS: Final = 128
"""Rows of a tile, where there are as many."""
FEWEST_ROWS: Final = 16
"""Fewest rows of a tile, those included that are not there: tensor cores take no fewer."""
TOKENS: Final = 64
"""Tokens of the context that a program decodes at once."""
WIDE: Final = 128
"""Channels from above which tiles are a quarter as high, and decode half as many tokens."""
IN_FOUR_WARPS: Final = 4096
"""Rows times channels of a tile that four warps hold in registers; others take eight, but for heads
above `WIDE` of 8-bit codes, of which eight warps would spill some."""
PART: Final = 256
"""Fewest tokens of the context worth a part of their own."""
MOST_PARTS: Final = 64
"""Largest number of parts of the context."""
PROGRAMS: Final = 512
"""Programs that keep a GPU busy: with as many tiles, the context is not split."""


@dataclass(frozen=True)
class Request:
    """What attention is to compute.

    Attributes:
        query, key, value, scoring: arguments of `quantine.kernels.kv_attention.attend`.
        mask: ``[batch, heads, tokens, context]``, with stride 0 where it is broadcast, or ``None``.
        ends: what `quantine.kernels.kv_attention.triton.seen.look` says of the mask.
    """

    query: Tensor
    key: PackedStates
    value: PackedStates
    scoring: Scoring
    mask: Tensor | None = None
    ends: Tensor | None = None

    @property
    def copies(self) -> int:
        """Heads of queries that share a head of keys."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def context(self) -> int:
        """Number of tokens of keys and values."""
        return self.key.shape[2]

    @property
    def top(self) -> int:
        """Largest step of rounded probabilities; 0 where they are not rounded."""
        bits = self.scoring.softmax_bits
        return 0 if bits == UNQUANTIZED else 2**bits - 1

    @property
    def width(self) -> int:
        """Channels that programs compute with."""
        return width_of(self.query.shape[3])

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        wanted: int = triton.next_power_of_2(self.copies * self.query.shape[2])
        most = MOST_ROWS if self.width <= WIDE else MOST_ROWS // 4
        return min(most, max(FEWEST_ROWS, wanted))

    @property
    def tiles(self) -> int:
        """Tiles of one sample, of all its heads."""
        return -(-self.copies * self.query.shape[2] // self.rows) * self.key.shape[1]

    @property
    def parts(self) -> int:
        """Parts of the context. It follows from shapes alone, so the host waits for nothing."""
        room = PROGRAMS // (self.tiles * len(self.query))
        return max(1, min(room, MOST_PARTS, -(-self.context // PART)))


@dataclass(frozen=True)
class Parts:
    """What programs find in the parts of the context, for each sample, head, token and part.

    Attributes:
        tops: ``[batch, heads, tokens, parts]`` float32: the largest score.
        sums: of the same shape: the sum of ``exp(score - top)``, or of rounded steps.
        mixed: ``[..., parts, width]`` float32: codes of values, so weighted; ``None`` for none.
    """

    tops: Tensor
    sums: Tensor
    mixed: Tensor | None

    @staticmethod
    def empty(request: Request, mixed: bool) -> Parts:
        """Memory for them."""
        query = request.query
        shape = (*query.shape[:3], request.parts)
        tops, sums = query.new_empty(2, *shape, dtype=torch.float32)
        codes = query.new_empty(*shape, request.width, dtype=torch.float32) if mixed else None
        return Parts(tops, sums, codes)


def launch(
    request: Request,
    known: tuple[Tensor, Tensor] | None = None,
    scores: Tensor | None = None,
    parts: Parts | None = None,
    out: Tensor | None = None,
) -> None:
    """Run the programs of all tiles and parts; arguments are those of `launch_of`."""
    program, operands, settings = launch_of(request, known, scores, parts, out)
    with backend.launching(request.query):
        program[(request.tiles, request.parts, len(request.query))](*operands, **settings)


def launch_of(
    request: Request,
    known: tuple[Tensor, Tensor] | None,
    scores: Tensor | None,
    parts: Parts | None,
    out: Tensor | None,
) -> tuple[Any, list[Any], dict[str, Any]]:
    """The program, its operands in order, and what is fixed when it is compiled.

    Args:
        request: what is computed.
        known: ``[batch, heads, tokens]`` float32 each: the largest score and the sum of
            probabilities over it, where these are rounded. ``None`` looks for them.
        scores: ``[batch, heads, tokens, context]`` float32, written where queries see something;
            ``None`` keeps none.
        parts: what is written, if the context has several, or only to find ``known``.
        out: ``[batch, tokens, heads, dim]``, written where ``parts`` is ``None``.
    """
    query, key, value = request.query, request.key, request.value
    key_words, *key_strides = _words(key)
    value_words, *value_strides = _words(value)
    ends, mask, scoring = request.ends, request.mask, request.scoring
    first, stops = (None, None) if ends is None else ends
    chunks = 1 if ends is None else ends.shape[4]
    operands = [
        query,
        *(key_words, key.scale, key.zero),
        *(value_words, value.scale, value.zero),
        *(mask, first, stops),
        *((None, None) if known is None else known),
        scores,
        *((None, None, None) if parts is None else (parts.mixed, parts.tops, parts.sums)),
        out,
        *(query.shape[1], query.shape[2], request.context, chunks),
        *query.stride(),
        *key_strides,
        *value_strides,
        *((0, 0, 0, 0) if mask is None else mask.stride()),
        *((0, 0, 0) if ends is None else ends.stride()[1:4]),
        *(scoring.scaling, scoring.softcap),
    ]
    wide_bytes = request.width > WIDE and max(key.bits, value.bits) == 8
    settings = {
        "KEY_BITS": key.bits,
        "VALUE_BITS": value.bits,
        "DIM": query.shape[3],
        "WIDTH": request.width,
        "COPIES": request.copies,
        "ROWS": request.rows,
        "TOKENS": TOKENS // 2 if request.width > WIDE and request.rows > FEWEST_ROWS else TOKENS,
        "CHUNKS": triton.next_power_of_2(chunks),
        "TOP": 0 if known is None else request.top,
        "RELATIVE": scoring.relative,
        "num_warps": 4 if request.rows * request.width <= IN_FOUR_WARPS or wide_bytes else 8,
        "num_stages": 2,
    }
    return attend_part, operands, settings


def _words(states: PackedStates) -> tuple[Tensor, int, int]:
    """Packed codes as words, or bytes if rows are not whole words; strides of samples and heads."""
    packed, row = states.packed, states.packed.shape[3]
    if packed.stride(3) != 1 or (packed.shape[2] > 1 and packed.stride(2) != row):
        packed = packed.contiguous()
    words = packed.view(torch.int32) if row % 4 == 0 else packed
    return words, words.stride(0), words.stride(1)
