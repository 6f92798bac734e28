"""Rounding of activations on GPUs, in Triton's interpreter, against PyTorch."""

from __future__ import annotations

import pytest
import torch
from gpu_device import DEVICE, EXAMPLES, moved
from hypothesis import given, settings
from hypothesis import strategies as st
from test_integer import grid_of
from test_triton_integer import bits_of_inputs, kinds, sizes
from torch import Tensor, nn

from quantine.activations.grids import StaticGrid, TokenGrid
from quantine.activations.modules import PermutedNorm
from quantine.kernels.integer.units.inputs import (
    InputUnits,
    Norm,
    Rounded,
    normed_reference,
    round_reference,
)

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from quantine.kernels.integer.triton.rounding import (  # noqa: E402
    MOST_UNITS,
    norm_and_round,
    round_inputs,
)

dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
EPS = 1e-5


def inputs_of(seed: int, kind: str, lengths: list[int], bits: int) -> InputUnits:
    grid = moved(grid_of(seed, kind, len(lengths), bits))
    order = torch.randperm(sum(lengths), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return InputUnits.of(grid, tuple(lengths), order, order.device)


def norm_of(
    seed: int, channels: int, centred: bool, biased: bool, dtype: torch.dtype = torch.float32
) -> Norm:
    g = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(2, channels, generator=g) + 1).to(DEVICE, dtype)
    return Norm(weight, bias if biased else None, EPS, centred)


def order_of(seed: int, channels: int) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1)
    return torch.randperm(channels, generator=g).int().to(DEVICE)


def activations(seed: int, batch: int, channels: int, size: float) -> Tensor:
    x = torch.randn(batch, channels, generator=torch.Generator().manual_seed(seed)) * size
    x[0, 0] = 0
    return x.to(DEVICE)


def bytes_of(rounded: Rounded) -> Tensor:
    """The codes in the order of places."""
    codes = rounded.codes
    if codes.dim() == 3:
        codes = codes.transpose(1, 2).contiguous().view(torch.int8).flatten(1)
    return codes.int()


@settings(max_examples=EXAMPLES)
@given(
    lengths=sizes,
    kind=kinds,
    bits=bits_of_inputs,
    batch=st.integers(1, 4),
    seed=st.integers(0, 99),
    dtype=dtypes,
    size=st.sampled_from([1e-30, 1e-3, 1.0, 30.0, 6e4]),
    in_quads=st.booleans(),
)
def test_rounding(
    lengths: list[int],
    kind: str,
    bits: int,
    batch: int,
    seed: int,
    dtype: torch.dtype,
    size: float,
    in_quads: bool,
) -> None:
    inputs = inputs_of(seed, kind, lengths, bits)
    x = activations(seed, batch, sum(lengths), size).to(dtype)
    found, expected = (f(x, inputs, in_quads) for f in (round_inputs, round_reference))
    for name in ("codes", "sums", "scale", "shift"):
        one, other = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)


@settings(max_examples=EXAMPLES)
@given(
    lengths=sizes,
    kind=kinds,
    bits=bits_of_inputs,
    seed=st.integers(0, 99),
    dtype=dtypes,
    centred=st.booleans(),
    biased=st.booleans(),
    ordered=st.booleans(),
    in_quads=st.booleans(),
)
def test_norms_before_rounding(
    lengths: list[int],
    kind: str,
    bits: int,
    seed: int,
    dtype: torch.dtype,
    centred: bool,
    biased: bool,
    ordered: bool,
    in_quads: bool,
) -> None:
    inputs = inputs_of(seed, kind, lengths, bits)
    if ordered:
        inputs = inputs.gathered(order_of(seed, sum(lengths)))
    inputs = inputs.after(norm_of(seed, sum(lengths), centred, biased, dtype))
    x = activations(seed, 3, sum(lengths), 5.0).to(dtype)
    normed, found = norm_and_round(x, inputs, in_quads)
    expected = round_reference(x, inputs, in_quads)
    close = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(normed, normed_reference(x, inputs), rtol=close, atol=1e-5)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-5, atol=1e-30)
    # Values that lie next to the middle between two codes may get either.
    assert_next_to(bytes_of(found), bytes_of(expected))
    assert torch.equal(found.sums, bytes_of(found).view(3, -1, 32).sum(2).float())


def assert_next_to(found: Tensor, expected: Tensor) -> None:
    apart = (found - expected).abs()
    assert int(apart.max()) <= 1
    assert int(apart.count_nonzero()) <= 2 + apart.numel() // 200


@pytest.mark.parametrize("kind", ["inside", "factors", "token"])
@pytest.mark.parametrize("centred", [False, True])
def test_codes_stand_for_what_the_modules_compute(centred: bool, kind: str) -> None:
    lengths, bits = [40, 7, 64], 8
    norm, order = norm_of(1, 111, centred, centred), order_of(1, 111)
    x = activations(2, 4, 111, 5.0)
    own: nn.Module = nn.RMSNorm(111, EPS) if not centred else nn.LayerNorm(111, EPS)
    own.to(DEVICE).load_state_dict(
        {"weight": norm.weight} | ({} if norm.bias is None else {"bias": norm.bias})
    )
    grid = moved(grid_of(1, kind, 3, bits))
    labels = torch.arange(3).repeat_interleave(torch.tensor(lengths)).int().to(DEVICE)
    rounding: nn.Module = TokenGrid(bits)
    if kind != "token":
        rounding = StaticGrid(bits, grid.scale, grid.zero, labels, reach=grid.reach)
    with torch.no_grad():
        expected = rounding(PermutedNorm(own, order)(x))
    inputs = InputUnits.of(grid, tuple(lengths), None, x.device)
    inputs = inputs.gathered(order).after(norm)
    found = round_inputs(x, inputs, False)
    codes = bytes_of(found)[:, inputs.there()].float()
    scale, zero = found.scale.unsqueeze(1), found.shift.unsqueeze(1)
    step = scale
    if kind != "token":
        step = grid.scale[labels.long()] * scale
        zero = grid.zero[labels.long()] - 2 ** (bits - 1)
    off = ((codes - zero) * step - expected).abs() / step
    assert float(off.max()) <= 1.001  # a neighbouring code at most
    assert int((off > 1e-3).sum()) <= 3


@pytest.mark.parametrize("kind", ["inside", "factors", "token"])
@pytest.mark.parametrize("centred", [False, True])
def test_long_rows_are_rounded_in_parts(centred: bool, kind: str) -> None:
    lengths = [9001, 8000]
    inputs = inputs_of(1, kind, lengths, 8)
    assert inputs.units > MOST_UNITS
    x = activations(1, 2, sum(lengths), 1.0)
    found, expected = round_inputs(x, inputs, True), round_reference(x, inputs, True)
    assert torch.equal(found.codes, expected.codes)
    inputs = inputs.gathered(order_of(1, sum(lengths)))
    inputs = inputs.after(norm_of(1, sum(lengths), centred, True))
    found, expected = round_inputs(x, inputs, True), round_reference(x, inputs, True)
    assert_next_to(bytes_of(found), bytes_of(expected))


def test_a_token_of_zeros() -> None:
    for kind in ("inside", "factors", "token"):
        inputs = inputs_of(1, kind, [5, 40], 8)
        found = round_inputs(torch.zeros(2, 45, device=DEVICE), inputs, False)
        expected = round_reference(torch.zeros(2, 45, device=DEVICE), inputs)
        assert torch.equal(found.codes, expected.codes)
        assert bool(found.scale.isfinite().all())
