"""Attention over packed keys and values on a GPU.

A program takes a tile of rows, the queries of a few tokens that share a head of keys, and a part of
the context. It decodes codes in registers and multiplies them by tensor cores; softmax goes along,
so scores are not kept. Parts are joined in their order, so results do not depend on the order in
which programs run. Where a mask hides the ends of the context from a tile, they are not read.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantine.kernels.bits.reference import packed_bytes
from quantine.kernels.kv_attention.packed_states import PackedStates
from quantine.kernels.kv_attention.reference import round_probabilities
from quantine.kernels.kv_attention.scoring import Scoring
from quantine.kernels.kv_attention.triton.joining import join
from quantine.kernels.kv_attention.triton.request import Parts, Request, launch
from quantine.kernels.kv_attention.triton.seen import look


def attend(
    query: Tensor,
    key: PackedStates,
    value: PackedStates,
    mask: Tensor | None,
    scoring: Scoring,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `quantine.kernels.kv_attention.attend`; has no gradients and no dropout."""
    _check(query, key, value, mask)
    request = Request(query, key, value, scoring)
    if mask is not None:
        request = _masked(request, mask)
    return _computed(request, keep)


def _check(query: Tensor, key: PackedStates, value: PackedStates, mask: Tensor | None) -> None:
    """Refuse shapes with which programs would read what is not theirs.

    Raises:
        ValueError: says which tensors do not fit.
    """
    batch, heads, tokens, dim = query.shape
    if key.shape != value.shape or key.shape[0] != batch or heads % key.shape[1] != 0:
        raise ValueError(f"keys and values do not fit {batch} samples of {heads} heads of queries")
    for states in (key, value):
        row = packed_bytes(dim, states.bits)
        if states.packed.shape[3] != row or states.scale.shape != (key.shape[1], dim):
            raise ValueError(
                f"bit streams of {dim} channels of {states.bits} bits have {row} bytes"
            )
    if mask is not None:
        wanted = (batch, heads, tokens, key.shape[2])
        given = mask[..., : key.shape[2]].shape
        if len(given) > 4 or any(
            size not in (1, whole) for size, whole in zip(given[::-1], wanted[::-1], strict=False)
        ):
            raise ValueError(f"a mask of {list(mask.shape)} does not fit scores of {list(wanted)}")


def _masked(request: Request, mask: Tensor) -> Request:
    """``request`` with a mask as `quantine.kernels.kv_attention.attend` takes it."""
    shape = (*request.query.shape[:3], request.context)
    mask = mask[..., : request.context]
    mask = mask[(None,) * (4 - mask.ndim)]
    ends = look(mask, request.context)
    return replace(request, mask=mask.expand(shape), ends=ends.expand(2, *shape[:3], -1))


def _computed(request: Request, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Outputs ``[batch, tokens, heads, dim]``, and probabilities if they are kept."""
    query, scoring = request.query, request.scoring
    batch, heads, tokens, dim = query.shape
    out, scores, known = query.new_empty(batch, tokens, heads, dim), None, None
    if keep:
        shape = (batch, heads, tokens, request.context)
        scores = query.new_full(shape, float("-inf"), dtype=torch.float32)
    if request.top:  # the largest probability, and the sum, must be known before any is rounded
        found = Parts.empty(request, mixed=False)
        launch(request, parts=found)
        largest = found.tops.amax(-1)
        known = largest, (found.sums * (found.tops - largest.unsqueeze(-1)).exp()).sum(-1)
    if request.parts == 1:
        launch(request, known, scores, out=out)
    else:
        found = Parts.empty(request, mixed=True)
        launch(request, known, scores, parts=found)
        join(request, found, out)
    if scores is None:
        return out, None
    probabilities = scores.softmax(-1)
    if request.top:
        probabilities = round_probabilities(probabilities, scoring.softmax_bits, scoring.relative)
    return out, probabilities.to(query.dtype)
