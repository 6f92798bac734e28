"""The rotation itself: orthogonal at every width, spreading, the same for the same seed."""

from __future__ import annotations

import math

import pytest
import torch

from quantine.core.rotation import Rotation

WIDTHS = (1, 2, 7, 64, 96, 576, 896, 1536)


def matrix_of(rotation: Rotation) -> torch.Tensor:
    return rotation.turned(torch.eye(rotation.width))


@pytest.mark.parametrize("keeps_ones", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_orthogonal_at_every_width(width: int, keeps_ones: bool) -> None:
    matrix = matrix_of(Rotation(width, 3, keeps_ones)).double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(width).double(), atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_vector_of_ones_stays_where_it_is_asked_to(width: int) -> None:
    ones = torch.ones(2, 3, width)
    assert torch.allclose(Rotation(width, 1, keeps_ones=True).turned(ones), ones, atol=1e-5)


@pytest.mark.parametrize("keeps_ones", [False, True])
@pytest.mark.parametrize("width", [576, 896, 1536])
def test_one_channel_is_spread_over_all(width: int, keeps_ones: bool) -> None:
    matrix = matrix_of(Rotation(width, 0, keeps_ones))
    # The channel whose signs all agree is reflected most: it ends like a random direction.
    assert float(matrix.abs().max()) < (5 if keeps_ones else 2.2) / width**0.5


def test_autocast_changes_nothing() -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = Rotation(96, None).turned(x)
    assert torch.equal(found, Rotation(96, None).turned(x))


def test_the_seed_decides() -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Rotation(96, 4).turned(x), Rotation(96, 4).turned(x))
    assert not torch.allclose(Rotation(96, 4).turned(x), Rotation(96, 5).turned(x), atol=0.1)


def test_many_rows_are_turned_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    whole = Rotation(96, 0, keeps_ones=True).turned(x)
    monkeypatch.setattr("quantine.core.rotation.AT_ONCE", 200)
    assert torch.allclose(Rotation(96, 0, keeps_ones=True).turned(x), whole, atol=1e-6)


def stated_sign(channel: int) -> int:
    """The sign of a channel as docs/format.md says it."""
    mixed = channel + 1
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = (mixed ^ (mixed >> shift)) * factor % 2**32
    return -1 if (mixed ^ (mixed >> 16)) % 2 else 1


@pytest.mark.parametrize("width", [1, 12, 96, 576])
def test_rotations_that_files_rely_on_are_those_of_the_format(width: int) -> None:
    odd = width
    while odd % 2 == 0:
        odd //= 2
    hadamard = torch.ones(1, 1)
    while len(hadamard) < width // odd:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    places = torch.arange(odd)
    angles = 2 * math.pi * torch.outer(places, places) / odd
    hartley = (angles.cos() + angles.sin()) / math.sqrt(odd)
    signs = torch.tensor([stated_sign(channel) for channel in range(width)]).float()
    expected = signs.unsqueeze(1) * torch.kron(hadamard / math.sqrt(len(hadamard)), hartley)
    found = Rotation(width, seed=None).turned(torch.eye(width))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert abs(float(signs.mean())) <= 3 / math.sqrt(width)
