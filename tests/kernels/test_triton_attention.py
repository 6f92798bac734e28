"""Attention over packed keys and values on GPUs, in Triton's interpreter, against the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from gpu_device import DEVICE, EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kv_attention import exact, states
from torch import Tensor

from quantine.core.activation_spec import UNQUANTIZED
from quantine.kernels.kv_attention import WIDEST
from quantine.kernels.kv_attention import attend as choose
from quantine.kernels.kv_attention.packed_states import PackedStates
from quantine.kernels.kv_attention.scoring import Scoring

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from quantine.kernels.kv_attention.triton import request as cutting
from quantine.kernels.kv_attention.triton.attention import attend
from quantine.kernels.kv_attention.triton.seen import CHUNK, look

LEAST = torch.finfo(torch.float32).min
MASKS = ("no", "causal", "window", "padding", "heads", "one row", "longer", "one number")

widths = st.integers(2, 8)
shapes = {
    "bits": st.tuples(widths, widths),
    "batch": st.sampled_from([1, 1, 1, 1, 2]),
    "heads": st.sampled_from([(1, 1), (1, 3), (1, 8), (2, 2)]),
    "dim": st.sampled_from([1, 7, 16, 32, 40, 64, 80, 96, 128]),
    "room": st.sampled_from([0, 3]),
    "seed": st.integers(0, 99),
}


def on_device(packed: PackedStates, dtype: torch.dtype = torch.float32) -> PackedStates:
    codes, scale, zero = (tensor.to(DEVICE) for tensor in packed.tensors())
    return PackedStates(codes, packed.bits, scale, zero, dtype)


def mask_of(kind: str, batch: int, heads: int, tokens: int, context: int) -> Tensor | None:
    """What is added to scores, of the shapes that models have and some that are allowed."""
    late = torch.arange(context)[None, :] - torch.arange(context - tokens, context)[:, None]
    causal = torch.where(late > 0, LEAST, 0.0)
    if kind == "no":
        return None
    if kind == "window":
        return torch.where(late > -3, causal, LEAST)[None, None]
    if kind == "padding":  # so that the first queries may see nothing
        padded = causal.repeat(batch, 1, 1, 1)
        padded[0, :, :, : context // 2] = LEAST
        return padded
    if kind == "heads":  # as ALiBi has it, another slope for each head
        return causal + late * 2.0 ** -torch.arange(1.0, heads + 1)[:, None, None]
    if kind == "one row":
        return torch.randn(batch, 1, 1, context)
    if kind == "longer":
        return torch.cat([causal, torch.zeros(tokens, 3)], 1)[None, None]
    return torch.full((1, 1, tokens, 1), 0.5) if kind == "one number" else causal


@contextmanager
def in_pieces() -> Iterator[None]:
    """Within it, short contexts have several parts, of several turns each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "PART", 20)
        patch.setattr(cutting, "TOKENS", 16)
        yield


def drawn(
    bits: tuple[int, int],
    batch: int,
    heads: tuple[int, int],
    tokens: int,
    context: int,
    dim: int,
    room: int,
    seed: int,
) -> tuple[Tensor, PackedStates, PackedStates]:
    """Queries, keys and values."""
    kv_heads, copies = heads
    shape = (batch, kv_heads, context, dim)
    key, value = states(seed, bits[0], shape, room), states(seed + 1, bits[1], shape, room)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, tokens, kv_heads * copies, dim, generator=generator) * dim**-0.5
    return query.transpose(1, 2), key, value


def computed(
    query: Tensor, key: PackedStates, value: PackedStates, mask: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """What the programs make of it, on the CPU."""
    on_gpu = on_device(key), on_device(value), None if mask is None else mask.to(DEVICE)
    out, probabilities = attend(query.to(DEVICE), *on_gpu, scoring, keep=True)
    assert probabilities is not None
    return out.cpu(), probabilities.cpu()


def assert_attention(
    query: Tensor, key: PackedStates, value: PackedStates, mask: Tensor | None, scoring: Scoring
) -> None:
    out, probabilities = computed(query, key, value, mask, scoring)
    expected, weights = exact(query, key, value, mask, scoring)
    top = weights.amax(-1, keepdim=True)
    error = score_error(query, key, scoring)
    allowed = error * top
    differing = (probabilities - weights).abs()
    if scoring.softmax_bits != UNQUANTIZED:
        # A share in the middle of two steps may go to either, and then others weigh less.
        step = 1.01 / (2**scoring.softmax_bits - 1)
        unsure = row_may_round_otherwise(query, key, value, mask, scoring)
        allowed = allowed + unsure * (step * top if scoring.relative else step)
    assert bool((differing <= allowed).all())
    reach = float(value.decoded().abs().max() + (value.scale * 2**value.bits).max())
    bound = (differing.sum(-1, keepdim=True) + 2 * error + 1e-5).transpose(1, 2) * reach
    assert bool(((out - expected).abs() <= bound).all())


def score_error(query: Tensor, key: PackedStates, scoring: Scoring) -> float:
    """How far scores may be off, as queries times the scales of keys are rounded to float16."""
    grouped = query.double().abs().reshape(len(query), len(key.scale), -1, query.shape[3])
    products = grouped @ (key.scale * 2 ** (key.bits - 1)).double().unsqueeze(-1)
    return 2.0**-11 * scoring.scaling * float(products.max()) + 1e-5


def row_may_round_otherwise(
    query: Tensor, key: PackedStates, value: PackedStates, mask: Tensor | None, scoring: Scoring
) -> Tensor:
    """Which rows of probabilities have one so near the middle of two steps that an error of scores
    within `score_error` may take it to the other; booleans ``[batch, heads, tokens, 1]``."""
    _, shares = exact(query, key, value, mask, Scoring(scoring.scaling, scoring.softcap))
    if scoring.relative:
        shares = shares / shares.amax(-1, keepdim=True)
    steps = shares * (2**scoring.softmax_bits - 1)
    from_middle = (steps - steps.floor() - 0.5).abs()
    return (from_middle <= 2.5 * score_error(query, key, scoring) * steps).any(-1, keepdim=True)


@settings(max_examples=EXAMPLES)
@given(
    tokens=st.sampled_from([1, 1, 2, 5]),
    context=st.sampled_from([1, 2, 15, 31, 33, 64, 65, 100, 129]),
    masked=st.sampled_from(MASKS),
    softcap=st.sampled_from([None, None, 5.0]),
    **shapes,
)
def test_few_queries_over_parts_of_the_context(
    tokens: int,
    context: int,
    masked: str,
    softcap: float | None,
    bits: tuple[int, int],
    batch: int,
    heads: tuple[int, int],
    dim: int,
    room: int,
    seed: int,
) -> None:
    query, key, value = drawn(bits, batch, heads, min(tokens, context), context, dim, room, seed)
    mask = mask_of(masked, *query.shape[:3], context)
    with in_pieces():
        assert_attention(query, key, value, mask, Scoring(0.5, softcap))


@settings(max_examples=EXAMPLES)
@given(
    tokens=st.sampled_from([17, 20, 33]),
    before=st.sampled_from([0, 0, 1, 32]),
    masked=st.sampled_from(MASKS),
    softcap=st.sampled_from([None, None, 5.0]),
    **shapes,
)
def test_many_queries_tile_by_tile(
    tokens: int,
    before: int,
    masked: str,
    softcap: float | None,
    bits: tuple[int, int],
    batch: int,
    heads: tuple[int, int],
    dim: int,
    room: int,
    seed: int,
) -> None:
    context = tokens + before
    query, key, value = drawn(bits, batch, heads, tokens, context, dim, room, seed)
    mask = mask_of(masked, *query.shape[:3], context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "PROGRAMS", 1)  # so that nothing is split
        assert_attention(query, key, value, mask, Scoring(0.5, softcap))


@settings(max_examples=EXAMPLES)
@given(
    tokens=st.sampled_from([1, 1, 3, 17]),
    context=st.sampled_from([1, 33, 41, 90]),
    masked=st.sampled_from(["no", "causal", "padding"]),
    softmax=widths,
    relative=st.booleans(),
    **(shapes | {"heads": st.just((1, 3)), "dim": st.sampled_from([1, 16, 40, 64])}),
)
def test_probabilities_are_rounded(
    tokens: int,
    context: int,
    masked: str,
    softmax: int,
    relative: bool,
    bits: tuple[int, int],
    batch: int,
    heads: tuple[int, int],
    dim: int,
    room: int,
    seed: int,
) -> None:
    query, key, value = drawn(bits, batch, heads, min(tokens, context), context, dim, room, seed)
    mask = mask_of(masked, *query.shape[:3], context)
    with in_pieces():
        assert_attention(query, key, value, mask, Scoring(0.5, None, softmax, relative))


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e3, 1e30])
def test_queries_of_any_size(size: float) -> None:
    query, key, value = drawn((4, 3), 1, (2, 2), 2, 40, 32, 0, 5)
    query[..., ::7] *= 50.0
    assert_attention(query * size, key, value, None, Scoring(0.3 / size))


def test_grids_of_any_size() -> None:
    query, key, value = drawn((4, 3), 1, (2, 2), 2, 40, 32, 0, 6)
    for states_of, size in ((key, 2.0**-30), (value, 2.0**30)):
        states_of.scale[:, ::2] *= size
    assert_attention(query, key, value, None, Scoring(0.3))


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN slice")  # NumPy's
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    query, *states_of = drawn((4, 4), 1, (1, 2), 3, 40, 16, 0, 7)
    query[0, 1, 2, 5] = value
    with in_pieces():
        out, probabilities = computed(query, *states_of, None, Scoring(0.3))
    reached = torch.zeros(1, 3, 2, dtype=torch.bool)
    reached[0, 2, 1] = True
    assert torch.equal(out.isnan().any(-1), reached)
    assert torch.equal(probabilities.isnan().any(-1), reached.transpose(1, 2))


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN slice")  # NumPy's
@pytest.mark.parametrize("softmax", [8, UNQUANTIZED])
def test_where_nothing_may_be_seen_numbers_are_not(softmax: int) -> None:
    query, key, value = drawn((4, 4), 2, (1, 2), 1, 40, 16, 0, 8)
    mask = torch.zeros(2, 1, 1, 40)
    mask[1] = -math.inf
    with in_pieces():
        out, _ = computed(query, key, value, mask, Scoring(0.3, None, softmax))
    assert bool(out[0].isfinite().all())
    assert bool(out[1].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_of_models(dtype: torch.dtype) -> None:
    query, key, value = drawn((4, 4), 1, (2, 2), 3, 40, 32, 0, 9)
    query = query.to(dtype)
    mask = torch.zeros(3, 40, dtype=dtype)
    mask[0, :7] = torch.finfo(dtype).min
    out, probabilities = computed(query, key, value, mask, Scoring(0.3))
    assert out.dtype == probabilities.dtype == dtype
    expected, weights = exact(query, key, value, mask.double(), Scoring(0.3))
    assert bool(((probabilities - weights).abs() <= 2 * torch.finfo(dtype).eps).all())
    assert bool(((out - expected).abs() <= 4 * torch.finfo(dtype).eps * expected.abs().max()).all())


def test_heads_that_are_wider_than_usual() -> None:
    assert_attention(*drawn((4, 3), 1, (1, 2), 40, 50, 200, 0, 10), None, Scoring(0.1))


def test_probabilities_that_nobody_reads_are_not_computed() -> None:
    query, *states_of = drawn((4, 4), 1, (2, 2), 3, 40, 32, 0, 11)
    on_gpu = query.to(DEVICE), *map(on_device, states_of)
    out, kept = attend(*on_gpu, None, Scoring(0.3), keep=False)
    assert kept is None
    assert torch.equal(out, attend(*on_gpu, None, Scoring(0.3), keep=True)[0])


@settings(max_examples=EXAMPLES)
@given(
    context=st.sampled_from([1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7]),
    tokens=st.integers(1, 6),
    hidden=st.sampled_from([LEAST, -math.inf]),
    seed=st.integers(0, 99),
)
def test_what_is_seen(context: int, tokens: int, hidden: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    few = torch.rand(2, 1, tokens, context, generator=generator) < 3 / context
    mask = torch.where(few, -1e30, hidden)
    found = look(mask.to(DEVICE), context).cpu()
    for chunk, part in enumerate(few.split(CHUNK, -1)):
        place = torch.arange(part.shape[-1]) + chunk * CHUNK
        assert torch.equal(found[0, ..., chunk], torch.where(part, place, context).amin(-1))
        assert torch.equal(found[1, ..., chunk], torch.where(part, place + 1, 0).amax(-1))


@pytest.mark.filterwarnings("ignore:overflow")  # NumPy's, beyond the last token that is read
def test_what_a_mask_hides_is_not_read() -> None:
    query, key, value = drawn((8, 8), 1, (1, 2), 2, 200, 16, 0, 12)
    # The codes of what may be seen are the zero point; scores of all others would be infinite.
    key.scale[:], key.zero[:], query[:] = 1e36, 128.0, 1.0
    key.packed[:] = 255
    key.packed[:, :, 64:100] = 128
    mask = torch.full((2, 200), LEAST)
    mask[0, 70:90] = mask[1, 75:100] = 0.0
    out, _ = computed(query, key, value, mask, Scoring(1.0))
    means = [value.decoded()[0, 0, start:stop].mean(0) for start, stop in ((70, 90), (75, 100))]
    expected = torch.stack(means)[None, :, None].expand_as(out)
    assert torch.allclose(out, expected, atol=1e-4)


def test_compilers_are_told_what_it_is() -> None:
    query, key, value = drawn((4, 3), 1, (2, 2), 2, 40, 16, 0, 13)
    operands = (
        query.to(DEVICE),
        *(
            each
            for s in map(on_device, (key, value))
            for each in (s.packed, s.bits, s.scale, s.zero)
        ),
        *(torch.zeros(2, 40, device=DEVICE), 0.3, None, 8, True, True),
    )
    outcomes = torch.library.opcheck(torch.ops.quantine.attend_packed.default, operands)
    assert set(outcomes.values()) == {"SUCCESS"}


def test_programs_are_chosen_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantine.kernels.backend.of", lambda *tensors: "triton")
    query, key, value = drawn((4, 3), 1, (2, 2), 2, 40, 16, 0, 14)
    operands = query.to(DEVICE), on_device(key), on_device(value)
    found = choose(*operands, None, Scoring(0.3), keep=False)
    assert found[1] is None
    assert torch.equal(found[0], attend(*operands, None, Scoring(0.3), keep=False)[0])
    # Dropout, and heads that are too wide, are the reference's.
    assert choose(*operands, None, Scoring(0.3), dropout=0.5, keep=False)[1] is not None
    wide = drawn((4, 3), 1, (1, 1), 1, 3, WIDEST + 1, 0, 15)
    assert choose(*wide, None, Scoring(0.3), keep=False)[1] is not None


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, key, value = drawn((4, 4), 1, (2, 2), 1, 30, 16, 0, 16)
    shorter = states(1, 4, (1, 2, 29, 16))
    with pytest.raises(ValueError, match="keys and values"):
        computed(query, key, shorter, None, Scoring(1.0))
    with pytest.raises(ValueError, match="bit streams"):
        computed(torch.randn(1, 4, 1, 24), key, value, None, Scoring(1.0))
    with pytest.raises(ValueError, match="mask"):
        computed(query, key, value, torch.zeros(3, 1, 1, 30), Scoring(1.0))
