"""The native sum of outer products against the PyTorch code that defines it."""

from __future__ import annotations

import pytest
import torch
from gpu_device import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantine.core.finite import is_finite
from quantine.kernels import backend
from quantine.kernels.gram import add_gram, tensor_cores
from quantine.kernels.gram.reference import add_gram_reference
from samples import generator, quick

TOLERANCE = 1e-5
"""Of sums of float32 in another order, relative to the sums of absolute values."""

native = backend.native()
tiles = pytest.mark.skipif(
    native is None or not native.multiplies_tiles(), reason="needs AMX and the extension"
)


def inputs(tokens: int, count: int, seed: int) -> Tensor:
    x = torch.randn(tokens, count, generator=generator(seed))
    x[:, ::5] *= 1e4
    x[:, 1::7] *= 1e-6
    return x.bfloat16()


@tiles
@quick
@given(
    tokens=st.integers(1, 90) | st.sampled_from([1024, 1025, 2080]),
    count=st.integers(1, 100),
    seed=st.integers(0, 999),
)
def test_native_equals_reference(tokens: int, count: int, seed: int) -> None:
    x = inputs(tokens, count, seed)
    start = x[:1].float().T @ x[:1].float()
    found, expected = start.clone(), start.clone()
    add_gram(found, x)
    add_gram_reference(expected, x)
    reach = start.abs() + x.double().abs().T @ x.double().abs()
    assert bool(((found - expected).abs() <= TOLERANCE * reach + 1e-30).all())
    assert torch.equal(found, found.T)


@tiles
def test_rows_need_not_be_contiguous_and_infinities_show() -> None:
    x = inputs(70, 80, 1)
    found, expected = torch.zeros(40, 40), torch.zeros(40, 40)
    add_gram(found, x[:, ::2])
    add_gram_reference(expected, x[:, ::2])
    torch.testing.assert_close(found, expected)
    x[3, 4] = torch.inf
    add_gram(found, x[:, ::2])
    assert not is_finite(found)


@tiles
def test_any_number_of_threads_finds_the_same_bits() -> None:
    x = inputs(1500, 200, 2)
    found = []
    for threads in (1, 2, 3, 7):
        found.append(torch.zeros(200, 200))
        native.add_gram(x.view(torch.int16), found[-1], native.Pool(threads))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_other_floats_go_through_pytorch() -> None:
    x = inputs(30, 12, 3).float() * 1.001
    found, expected = torch.zeros(12, 12), torch.zeros(12, 12)
    add_gram(found, x)
    add_gram_reference(expected, x)
    assert torch.equal(found, expected)


@tiles
def test_wrong_shapes_are_refused() -> None:
    x = inputs(3, 8, 4).view(torch.int16)
    with pytest.raises(ValueError, match="total"):
        native.add_gram(x, torch.zeros(8, 9), native.Pool(1))


@pytest.mark.parametrize("dtype", tensor_cores.DTYPES)
def test_tensor_cores_get_16_bits_and_give_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "of", lambda *_: "triton")
    asked = []

    def mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        asked.append((left.dtype, right.dtype, out_dtype))
        return left.to(out_dtype) @ right.to(out_dtype)  # which PyTorch has on GPUs only

    monkeypatch.setattr(torch, "mm", mm)
    x = inputs(40, 300, 5).to(dtype)
    found = torch.zeros(300, 300)
    add_gram(found, x)
    monkeypatch.undo()
    expected = torch.zeros(300, 300)
    add_gram_reference(expected, x)
    assert torch.equal(found, expected)
    assert set(asked) == {(dtype, dtype, torch.float32)}
    # PyTorch knows this call, though not on the CPU.
    tensor_cores.add_gram(found.to("meta"), x.to("meta"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", tensor_cores.DTYPES)
def test_a_gpu_sums_what_the_reference_sums(dtype: torch.dtype) -> None:
    x = inputs(2048, 700, 6).clamp(-1e3, 1e3).to(dtype)
    found, expected = torch.zeros(700, 700, device=DEVICE), torch.zeros(700, 700)
    add_gram(found, x.to(DEVICE))
    add_gram_reference(expected, x)
    reach = x.double().abs().T @ x.double().abs()
    assert bool(((found.cpu() - expected).abs() <= TOLERANCE * reach + 1e-30).all())
    assert torch.equal(found, found.T)
