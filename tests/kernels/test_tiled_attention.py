"""Attention tile by tile: against the reference, and where it is not to be used."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from quantine.core.activation_spec import UNQUANTIZED
from quantine.kernels.kv_attention import TILED, attend
from quantine.kernels.kv_attention.reference import attend_reference
from quantine.kernels.kv_attention.scoring import Scoring
from quantine.kernels.kv_attention.tiled import TILE, attend_in_tiles


@given(
    batch=st.integers(1, 2),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    tokens=st.sampled_from([1, 3, 64, 300]),
    before=st.sampled_from([0, 1, 50]),
    masked=st.sampled_from(["no", "causal", "heads", "padding", "longer"]),
    softcap=st.sampled_from([None, 5.0]),
    softmax=st.sampled_from([2, 4, 8, UNQUANTIZED]),
    relative=st.booleans(),
    keep=st.booleans(),
    tile=st.sampled_from([1, 1000, TILE]),
    seed=st.integers(0, 99),
)
@example(2, (2, 3), 300, 50, "causal", None, 8, True, True, 1000, 0)
def test_tiles_are_the_reference(
    batch: int,
    heads: tuple[int, int],
    tokens: int,
    before: int,
    masked: str,
    softcap: float | None,
    softmax: int,
    relative: bool,
    keep: bool,
    tile: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    kv_heads, copies = heads
    context, dim = tokens + before, 8
    query = torch.randn(batch, kv_heads * copies, tokens, dim, dtype=torch.float64)
    key, value = torch.randn(2, batch, kv_heads, context, dim, dtype=torch.float64).unbind()
    mask = masks(masked, batch, kv_heads * copies, tokens, context)
    scoring = Scoring(0.5, softcap, softmax, relative)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantine.kernels.kv_attention.tiled.TILE", tile)
        out, probabilities = attend_in_tiles(query, key, value, mask, scoring, keep)
    expected, exactly = attend_reference(query, key, value, mask, scoring)
    assert torch.allclose(out, expected, atol=1e-9)
    if keep:
        assert probabilities is not None
        assert torch.allclose(probabilities, exactly, atol=1e-9)
    else:
        assert probabilities is None


def masks(kind: str, batch: int, heads: int, tokens: int, context: int) -> Tensor | None:
    """What is added to scores, the numbers that transformers hides with among it."""
    least = torch.finfo(torch.float64).min
    causal = torch.full((tokens, context), least, dtype=torch.float64).triu(context - tokens + 1)
    if kind == "no":
        return None
    if kind == "causal":
        return causal
    if kind == "heads":
        return torch.randn(batch, heads, tokens, context, dtype=torch.float64)
    if kind == "longer":
        return torch.cat([causal, torch.zeros(tokens, 3, dtype=torch.float64)], 1)[None, None]
    padded = causal.expand(batch, 1, tokens, context).clone()
    padded[0, :, :, : context // 2] = least  # so that the first queries see nothing
    return padded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_of_float32_whatever_is_wanted_around(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 200, 16).to(dtype).unbind()
    mask = masks("causal", 1, 4, 200, 200)
    assert mask is not None
    args = (mask.clamp(min=-1e30).float(), Scoring(0.25, None, 8, True))
    plain, kept = attend_in_tiles(query, key, value, *args, keep=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = attend_in_tiles(query, key, value, *args, keep=True)
    assert plain.dtype == dtype
    assert kept is not None
    assert kept.dtype == dtype
    assert torch.equal(plain, cast)
    exact, _ = attend_reference(query.float(), key.float(), value.float(), *args)
    assert torch.equal(plain, exact.to(dtype)) or torch.allclose(
        plain.float(), exact, atol=torch.finfo(dtype).eps * 4
    )


@pytest.mark.parametrize("tokens", [TILED - 1, 300])
def test_probabilities_are_kept_unless_nobody_wants_them(tokens: int) -> None:
    query, key, value = torch.randn(3, 1, 2, tokens, 8).unbind()
    expected = attend_reference(query, key, value, None, Scoring(0.3))
    for keep in (True, False):
        out, kept = attend(query, key, value, None, Scoring(0.3), keep=keep)
        assert torch.allclose(out, expected[0], atol=1e-5)
        if keep:
            assert kept is not None
            assert torch.allclose(kept, expected[1], atol=1e-5)
        else:
            assert (kept is None) == (tokens > TILED)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace`:DeprecationWarning")
def test_a_recording_holds_for_other_masks() -> None:
    query, key, value = torch.randn(3, 1, 2, 300, 8).unbind()
    closed = masks("padding", 1, 2, 300, 300)
    assert closed is not None
    closed = closed.clamp(min=-1e30).float()

    def one(mask: Tensor) -> Tensor:
        return attend(query, key, value, mask, Scoring(0.3))[0]

    recorded = torch.jit.trace(one, (closed,))
    opened = torch.zeros_like(closed)
    assert torch.allclose(recorded(opened), one(opened), atol=1e-5)


def test_masks_learn_too() -> None:
    query, key, value = torch.randn(3, 1, 2, 300, 8).unbind()
    mask = torch.zeros(300, 300, requires_grad=True)
    out, _ = attend(query, key, value, mask, Scoring(0.3, None, 8))
    (found,) = torch.autograd.grad(out[..., 0].square().sum(), mask)
    assert found.shape == mask.shape
    assert found.isfinite().all()


def test_no_tokens_have_no_outputs() -> None:
    query, key = torch.randn(2, 4, 0, 8), torch.randn(2, 2, 5, 8)
    out, _ = attend_in_tiles(query, key, key, None, Scoring(0.3), keep=False)
    assert out.shape == (2, 0, 4, 8)


def test_learning_has_the_gradient_of_the_reference() -> None:
    query = torch.randn(1, 2, 300, 8, requires_grad=True)
    key, value = torch.randn(2, 1, 2, 300, 8).unbind()
    outs = (each(query, key, value, None, Scoring(0.25))[0] for each in (attend, attend_reference))
    found, expected = (torch.autograd.grad(out.square().sum(), query)[0] for out in outs)
    assert found.abs().max() > 0
    assert torch.equal(found, expected)
